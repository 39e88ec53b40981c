# Units of systemd in the job: the image is a plain operating system, and the job says what it does.
#
# It uses the image of debian.hcl. Nomad's templates write the units into /local. A variable tells the systemd inside to
# look for units there first.
job "unit" {
  type = "service"

  group "unit" {
    task "clock" {
      driver = "nspawn"

      config {
        image = "debian"

        # A private root over the image, so that any number of tasks can use the image at once.
        ephemeral = true

        environment = {
          SYSTEMD_UNIT_PATH = "/local/systemd:" # the colon at the end adds the usual places
        }

        # The task counts as started when its systemd reports that it has reached its default target.
        notify_ready = true

        # A secret for this unit only. It is in no environment and on no command line.
        set_credential = {
          "clock.greeting" = "The time by ${NOMAD_ALLOC_NAME}"
        }
      }

      template {
        destination = "local/systemd/clock.service"
        data        = <<-EOT
          [Unit]
          Description=Tells the time

          [Service]
          LoadCredential=clock.greeting
          ExecStart=/bin/sh -c 'while :; do echo "$$(cat $CREDENTIALS_DIRECTORY/clock.greeting): $$(date)"; sleep 1; done'
          StandardOutput=journal+console
          DynamicUser=yes
          EOT
      }

      template {
        destination = "local/systemd/multi-user.target.d/clock.conf"
        data        = <<-EOT
          [Unit]
          Wants=clock.service
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
