# The web server of nginx.hcl in a network of its group. Nomad and its CNI plugins make the network and map the port.
#
# `sudo sh example/nginx/image.sh` makes the image. The client needs the CNI plugins (Debian: package
# containernetworking-plugins), and the agent's configuration says where they are:
#
#     client {
#       cni_path = "/usr/lib/cni"
#     }
#
# connect.hcl is the same web server behind a proxy of Consul.
job "bridge" {
  type = "service"

  group "nginx" {
    network {
      mode = "bridge"

      # Nomad picks a free port of the host and forwards it to port 80 inside.
      port "http" {
        to = 80
      }

      # Without this block the host's name servers are used.
      dns {
        servers = ["9.9.9.9"]
      }
    }

    task "nginx" {
      driver = "nspawn"

      config {
        image       = "nginx"
        ephemeral   = true # any number of tasks can use the image at once
        boot        = false
        process_two = true
        command     = ["nginx", "-c", "/local/nginx.conf", "-g", "daemon off;"]
      }

      kill_signal  = "SIGQUIT"
      kill_timeout = "10s"

      template {
        destination = "local/nginx.conf"
        data        = <<-EOT
          user www-data;
          worker_processes 1;
          error_log stderr;
          events {}
          http {
            access_log off;
            server {
              listen {{ env "NOMAD_PORT_http" }};
              location / {
                default_type text/plain;
                return 200 "Hello from {{ env "NOMAD_ALLOC_NAME" }}\n";
              }
            }
          }
          EOT
      }

      resources {
        cpu    = 100
        memory = 64
      }
    }
  }
}
