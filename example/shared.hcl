# Five Debians from one image. Each may write anywhere. Nothing is copied, and what a task writes is deleted when it
# ends.
#
# The image is that of debian.hcl. It is not changed, and any number of tasks can use it at the same time.
job "shared" {
  type = "service"

  group "shared" {
    count = 5

    # Space for what the group's tasks write, in MB.
    ephemeral_disk {
      size = 500
    }

    task "writer" {
      driver = "nspawn"

      config {
        image = "debian"

        # A private root over the image, with users of the task's own. It is made in some milliseconds.
        ephemeral = true

        boot        = false
        process_two = true
        command     = ["/bin/sh", "-c", "echo $NOMAD_ALLOC_INDEX >/etc/hostname; rm -r /usr/share/doc; exec sleep 1d"]
      }

      resources {
        cpu    = 100
        memory = 64
      }
    }
  }
}
