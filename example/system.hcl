# A system job: it runs on every client, with the host's network and the host's users, and watches the host itself.
#
# It uses the image of debian.hcl. It needs the permissions host_network and host_users, and "/var/log" in allow_paths.
# An empty plugin block gives them; with that of hardened.hcl the job is refused.
job "system" {
  type = "system"

  group "system" {
    task "watch" {
      driver = "nspawn"

      config {
        image            = "debian"
        ephemeral        = true
        boot             = false
        process_two      = true
        network_veth     = false
        user_namespacing = false

        # The host's logs, read-only.
        bind_read_only = {
          "/var/log" = "/mnt"
        }

        # Root of the host, but without the capabilities that could do harm.
        drop_capability   = ["all"]
        no_new_privileges = true

        command = ["/bin/sh", "-c", <<-EOT
          while :; do
            echo "load $(cut -d ' ' -f 1-3 /proc/loadavg), log files: $(ls /mnt | wc -l)"
            sleep 2
          done
          EOT
        ]
      }

      resources {
        cpu    = 50
        memory = 32
      }
    }
  }
}
