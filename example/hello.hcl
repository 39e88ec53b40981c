# One command instead of a whole system. It starts in about a tenth of a second, prints some lines, and ends.
#
# It uses the image of debian.hcl.
job "hello" {
  type = "batch"

  group "hello" {
    # Run it only once, so that a failure is visible.
    restart {
      attempts = 0
      mode     = "fail"
    }

    task "hello" {
      driver = "nspawn"

      config {
        image = "debian"

        # Run the command below instead of the image's init,
        boot = false

        # as process 2, under a small process 1 that reaps the processes that the command leaves.
        process_two = true

        # A private root over the image, so that any number of tasks can use the image at once.
        ephemeral = true

        command = ["/bin/sh", "-euc", <<-EOT
          echo "Hello from $NOMAD_TASK_NAME, as $(id -un) with process id $$"
          echo "$GREETING"
          echo "The system is $(. /etc/os-release; echo "$PRETTY_NAME")"
          env | sort | grep ^NOMAD_
          for line in 1 2 3 4 5; do
            echo "line $line"
            sleep 0.2
          done
          echo "This line goes to the other log" >&2
          EOT
        ]
      }

      env {
        GREETING = "This is allocation ${NOMAD_SHORT_ALLOC_ID} on ${node.unique.name}"
      }

      resources {
        cpu    = 100
        memory = 64
      }
    }
  }
}
