# A web server without an init: nginx itself is the payload.
#
# `sudo sh example/nginx/image.sh` makes the image. The job needs the permission host_network.
job "nginx" {
  type = "service"

  group "nginx" {
    network {
      # Nomad picks a free port of the host; the template below tells nginx.
      port "http" {}
    }

    task "nginx" {
      driver = "nspawn"

      config {
        image       = "nginx"
        ephemeral   = true # any number of tasks can use the image at once
        boot        = false
        process_two = true
        command     = ["nginx", "-c", "/local/nginx.conf", "-g", "daemon off;"]

        # Use the host's network. In a user namespace root may not listen on the host's ports below 1024, so nginx
        # listens on the port that Nomad picked, not on 80.
        network_veth = false
      }

      # On SIGQUIT nginx first answers the requests it has begun, then ends.
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
