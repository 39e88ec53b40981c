# A prestart task builds the image that the main task runs from. The image is in the directory that the tasks of the
# allocation share, and is removed with it.
#
# The image of the builder is a Debian with mmdebstrap. As root, this makes it:
#
#     mkdir -p -m 700 /var/lib/machines
#     mmdebstrap --variant=minbase --include=mmdebstrap,ca-certificates bookworm /var/lib/machines/builder
job "build" {
  type = "batch"

  group "build" {
    # Space for the image, in MB.
    ephemeral_disk {
      size = 1000
    }

    task "image" {
      driver = "nspawn"

      lifecycle {
        hook = "prestart"
      }

      config {
        image        = "builder"
        ephemeral    = true
        boot         = false
        network_veth = false # the host's network, to fetch the packages
        command      = ["mmdebstrap", "--variant=minbase", "--include=figlet", "bookworm", "/alloc/image"]
      }

      resources {
        cpu    = 1000
        memory = 500
      }
    }

    task "app" {
      driver = "nspawn"

      config {
        # A path that begins with "alloc/" is in the directory that the tasks of the allocation share.
        image     = "alloc/image"
        ephemeral = true
        boot      = false
        command   = ["/usr/bin/figlet", "built here"]
      }

      resources {
        cpu    = 100
        memory = 64
      }
    }
  }
}
