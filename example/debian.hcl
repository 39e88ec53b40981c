# A whole Debian, booted by its own systemd: a virtual machine's comfort at a process's price.
#
# Its image is a directory. This makes one named "debian" where the driver looks for names:
#
#     mmdebstrap --variant=minbase --include=systemd,systemd-sysv,dbus bookworm /var/lib/machines/debian
#     : > /var/lib/machines/debian/etc/machine-id
#
# The second line lets the allocation's id be the machine id.
# `sh build.sh demo` does the same.
job "debian" {
  type = "service"

  group "debian" {
    task "debian" {
      driver = "nspawn"

      config {
        # A directory in /var/lib/machines, or a path.
        image = "debian"

        # Use the host's name servers inside, too.
        resolv_conf = "copy-host"

        # Not written here, because they are the defaults: boot = true starts the image's init as process 1, and
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
