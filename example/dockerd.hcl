# Docker in a container, for example to build images: `nomad alloc exec ID docker run ...`.
#
# As root, this makes its image:
#
#     mkdir -p -m 700 /var/lib/machines
#     mmdebstrap --variant=minbase \
#         --include=systemd,systemd-sysv,systemd-resolved,dbus,docker.io,iptables,ca-certificates,iproute2 \
#         bookworm /var/lib/machines/docker
#     systemctl --root=/var/lib/machines/docker enable systemd-networkd
#     : > /var/lib/machines/docker/etc/machine-id
#
# The job needs the permission system_calls: allow = ["default", "system_calls"] in the plugin's block. Docker needs a
# network of the container's own, where it may make bridges and firewall rules: it cannot run in the network of a group.
job "dockerd" {
  type = "service"

  group "dockerd" {
    task "dockerd" {
      driver = "nspawn"

      config {
        image     = "docker"
        ephemeral = true

        # runc makes a session keyring for each container.
        system_call_filter = ["@keyring"]

        # Docker's images and containers, in memory: its overlays cannot lie on the private root, which is an overlay
        # itself. Without this line Docker copies whole images. To keep them on disk, mount a volume of Nomad there.
        tmpfs = ["/var/lib/docker"]
      }

      kill_timeout = "30s"

      resources {
        cpu    = 1000
        memory = 1000
      }
    }
  }
}
