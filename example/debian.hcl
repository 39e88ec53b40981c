# A whole Debian, booted by its own systemd: like a virtual machine, but as cheap as a process.
#
# Its image is a directory. As root, this makes one named "debian" in the directory where the driver looks for names:
#
#     mkdir -p -m 700 /var/lib/machines
#     mmdebstrap --variant=minbase --include=systemd,systemd-sysv,systemd-resolved,dbus bookworm \
#         /var/lib/machines/debian
#     systemctl --root=/var/lib/machines/debian enable systemd-networkd
#     : > /var/lib/machines/debian/etc/machine-id
#
# The third command gives the system a DHCP client. The last one empties the image's machine id, so that each task gets
# its allocation's id as machine id.
#
# The job says nothing about its network, so it has one of its own with a link to the host. systemd-networkd on the
# host gives out its address: systemctl enable --now systemd-networkd
job "debian" {
  type = "service"

  group "debian" {
    task "debian" {
      driver = "nspawn"

      config {
        # A directory in /var/lib/machines, or a path.
        image = "debian"

        # A private root for the task over the image, so that any number of tasks can use the image at once. What the
        # task changes is deleted when it ends. See writable.hcl for a task that keeps its changes.
        ephemeral = true

        # If the host has its name servers neither from systemd-networkd nor from systemd-resolved, use those of its
        # /etc/resolv.conf:
        # resolv_conf = "replace-host"

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
