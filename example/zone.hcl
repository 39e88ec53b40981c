# Two systems in a network zone: a bridge of their own that exists as long as one of them runs.
#
# It uses the image of debian.hcl. systemd-networkd on the host gives out the addresses.
job "zone" {
  type = "service"

  group "zone" {
    task "left" {
      driver = "nspawn"

      config {
        image        = "debian"
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
        image        = "debian"
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
