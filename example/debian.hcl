# A whole Debian, booted by its own systemd: like a virtual machine, but as cheap as a process.
#
# Its image is a directory. As root, this makes one named "debian" in the directory where the driver looks for names:
#
#     mkdir -p -m 700 /var/lib/machines
#     mmdebstrap --variant=minbase --include=systemd,systemd-sysv,dbus bookworm /var/lib/machines/debian
#     : > /var/lib/machines/debian/etc/machine-id
#
# The last line empties the image's machine id, so that each task gets its allocation's id as machine id.
# `sh build.sh demo` makes such an image, too.
job "debian" {
  type = "service"

  group "debian" {
    task "debian" {
      driver = "nspawn"

      config {
        # A directory in /var/lib/machines, or a path.
        image = "debian"

        # A private root for the task over the image, so that any number of tasks can use the image at once. What the
        # task changes is deleted when it ends. Without this line the task writes to the image itself: its changes
        # stay, and no other task can use the image meanwhile.
        ephemeral = true

        # Use the host's name servers inside, too.
        resolv_conf = "copy-host"

        # These are the defaults, so they are not written here: boot = true starts the image's init as process 1, and
        # user_namespacing = true makes root inside an ordinary user outside.
      }

      # A system needs longer to shut down than a single command; the default is 5s.
      kill_timeout = "20s"

      resources {
        cpu    = 500
        memory = 256
      }
    }
  }
}
