# The web server of nginx.hcl in a service mesh. Others can reach it only through a proxy of Consul in the same group.
#
# `sudo sh example/nginx/image.sh` makes the image. The client needs Consul, and the CNI plugins as for bridge.hcl.
job "connect" {
  type = "service"

  group "web" {
    # All tasks of the group share one network, so server and proxy reach each other on 127.0.0.1.
    network {
      mode = "bridge"
    }

    service {
      name = "web"
      port = "8080"

      connect {
        sidecar_service {
          proxy {
            # Another service of the mesh, which the task reaches at 127.0.0.1:5432 (NOMAD_UPSTREAM_ADDR_database).
            upstreams {
              destination_name = "database"
              local_bind_port  = 5432
            }
          }
        }

        # By default Nomad runs the proxy with Docker. With this block the client needs no Docker.
        sidecar_task {
          driver = "nspawn"

          config {
            image   = "docker://docker.io/envoyproxy/envoy:v1.34.1"
            boot    = false
            command = ["envoy", "-c", "/secrets/envoy_bootstrap.json", "--concurrency", "1", "--disable-hot-restart"]
          }
        }
      }
    }

    task "web" {
      driver = "nspawn"

      config {
        image       = "nginx"
        ephemeral   = true
        boot        = false
        process_two = true
        command     = ["nginx", "-c", "/local/nginx.conf", "-g", "daemon off;"]
      }

      kill_signal = "SIGQUIT"

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
              listen 127.0.0.1:8080;
              location / {
                default_type text/plain;
                return 200 "Hello from the mesh\n";
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
