# The web server of nginx.hcl in a service mesh: Consul lets others reach it through a proxy beside it only.
#
# `sh example/nginx/image.sh` makes its image. The client needs Consul, and the CNI plugins as for bridge.hcl.
job "connect" {
  type = "service"

  group "web" {
    # What runs in the group shares one network, so server and proxy meet on its 127.0.0.1.
    network {
      mode = "bridge"
    }

    service {
      name = "web"
      port = "8080"

      connect {
        sidecar_service {
          proxy {
            # What the task finds at 127.0.0.1:5432, NOMAD_UPSTREAM_ADDR_database, is another service of the mesh.
            upstreams {
              destination_name = "database"
              local_bind_port  = 5432
            }
          }
        }

        # Nomad would run the proxy with Docker; so it needs none.
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
