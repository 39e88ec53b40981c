# Five Debians from one image, each of which may write wherever it likes: nothing is copied, and when a task ends,
# what it has written is gone.
#
# The image is that of debian.hcl; it stays as it is, and can be used by any number of tasks at the same time.
job "shared" {
  type = "service"

  group "shared" {
    count = 5

    # Room for what a task writes, in MB.
    ephemeral_disk {
      size = 500
    }

    task "writer" {
      driver = "nspawn"

      config {
        image = "debian"

        # A root of the task's own over the image, with users of its own, in some milliseconds.
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
