# A booted system as a batch job: it runs one unit, shuts down when the unit ends, and ends with the unit's exit code.
#
# It uses the image of debian.hcl.
job "nightly" {
  type = "batch"

  group "nightly" {
    # Run it only once, so that a failure is visible.
    restart {
      attempts = 0
      mode     = "fail"
    }

    reschedule {
      attempts  = 0
      unlimited = false
    }

    task "nightly" {
      driver = "nspawn"

      config {
        image     = "debian"
        ephemeral = true

        # The task is this service: its stdout, its stderr and its exit code are the task's.
        unit = "nightly.service"

        environment = {
          SYSTEMD_UNIT_PATH = "/local/systemd:" # the colon at the end adds the usual places
        }
      }

      template {
        destination = "local/systemd/nightly.service"
        data        = <<-EOT
          [Unit]
          Description=What this job is for

          [Service]
          Type=oneshot
          ExecStart=/bin/sh -c 'echo "$(ls /usr/bin | wc -l) programs in the image"; exit 7'
          EOT
      }

      kill_timeout = "20s"

      resources {
        cpu    = 200
        memory = 128
      }
    }
  }
}
