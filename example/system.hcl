# A system job: on every client, with the host's network and the host's users, for what looks after the host itself.
#
# It uses the image of debian.hcl. An operator who allows neither says so in the plugin's block (see hardened.hcl),
# and then this job is refused there.
job "system" {
  type = "system"

  group "system" {
    task "watch" {
      driver = "nspawn"

      config {
        image            = "debian"
        read_only        = true
        boot             = false
        process_two      = true
        network_veth     = false
        user_namespacing = false

        # The host's processes and logs, to look at only.
        bind_read_only = {
          "/var/log" = "/mnt"
        }

        # Root of the host without what root could do harm with.
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
