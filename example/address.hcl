# A command with a fixed address. It needs no DHCP client and no wait: Nomad registers the service at its start.
#
# It uses the image of debian.hcl. The client needs `ip` (package iproute2). Both tasks are in a network zone, which
# only containers of this client reach. For an address in the LAN, take network_bridge or network_macvlan.
job "address" {
  type = "service"

  group "address" {
    task "server" {
      driver = "nspawn"

      config {
        image       = "debian"
        ephemeral   = true
        boot        = false
        process_two = true

        network_zone    = "address"
        network_address = ["10.73.0.1/24"]

        command = ["/usr/bin/perl", "-MIO::Socket::INET", "-e", <<-EOT
          my $server = IO::Socket::INET->new(LocalPort => 8000, Listen => 5, ReuseAddr => 1) or die $!;
          while (my $client = $server->accept) { print $client "hello from ", $client->sockhost, "\n" }
          EOT
        ]
      }

      # `nomad service info address` shows 10.73.0.1:8000.
      service {
        name         = "address"
        provider     = "nomad"
        port         = 8000
        address_mode = "driver"
      }

      resources {
        cpu    = 100
        memory = 64
      }
    }

    task "client" {
      driver = "nspawn"

      config {
        image       = "debian"
        ephemeral   = true
        boot        = false
        process_two = true

        network_zone    = "address"
        network_address = ["10.73.0.2/24"]

        command = ["/bin/bash", "-c", "until cat </dev/tcp/10.73.0.1/8000; do sleep 1; done; exec sleep 1d"]
      }

      resources {
        cpu    = 100
        memory = 64
      }
    }
  }
}
