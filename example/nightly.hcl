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

        environment = {
          SYSTEMD_UNIT_PATH = "/local/systemd:" # the colon at the end adds the usual places
        }

        # Write the container's whole journal to the console, and so into `nomad alloc logs`:
        # command = ["systemd.journald.forward_to_console=1"]
      }

      template {
        destination = "local/systemd/nightly.service"
        data        = <<-EOT
          [Unit]
          Description=What this job is for
          # These two end the system, and so the task, with the unit's exit code.
          SuccessAction=exit
          FailureAction=exit

          [Service]
          Type=oneshot
          ExecStart=/bin/sh -c 'echo "$(ls /usr/bin | wc -l) programs in the image"; exit 7'
          StandardOutput=journal+console
          EOT
      }

      template {
        destination = "local/systemd/multi-user.target.d/nightly.conf"
        data        = <<-EOT
          [Unit]
          Wants=nightly.service
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
