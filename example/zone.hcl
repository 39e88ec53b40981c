# Two systems in a network zone: a bridge of their own that exists as long as one of them runs.
#
# The image is like that of debian.hcl, but with systemd-networkd and systemd-resolved. This makes it, as root:
#
#     mkdir -p -m 700 /var/lib/machines
#     mmdebstrap --variant=minbase --include=systemd,systemd-sysv,dbus,systemd-resolved,iproute2,iputils-ping \
#         bookworm /var/lib/machines/debian-net
#     systemctl --root=/var/lib/machines/debian-net enable systemd-networkd
#     : > /var/lib/machines/debian-net/etc/machine-id
#
# systemd-networkd on the host gives out the addresses.
job "zone" {
  type = "service"

  group "zone" {
    task "left" {
      driver = "nspawn"

      config {
        image        = "debian-net"
        ephemeral    = true
        network_zone = "example"
        hostname     = "left"
      }

      kill_timeout = "20s"

      resources {
        cpu    = 200
        memory = 128
      }
    }

    task "right" {
      driver = "nspawn"

      config {
        image        = "debian-net"
        ephemeral    = true
        network_zone = "example"
        hostname     = "right"
      }

      kill_timeout = "20s"

      resources {
        cpu    = 200
        memory = 128
      }
    }
  }
}
