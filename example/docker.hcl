# An image from a registry. Its layers are fetched once for all images that have them, and stacked; the task's own
# changes lie above them and are gone at its end.
job "docker" {
  group "docker" {
    task "web" {
      driver = "nspawn"

      config {
        image = "docker://docker.io/library/nginx:1.27"

        # Such images hold one program and no init. Which program, its variables, user and directory are the image's
        # own; command = [...] would replace Entrypoint and Cmd.
        boot = false

        # For a private registry; or once for all jobs in the plugin's block.
        # auth {
        #   username = "ci"
        #   password = var.token
        # }
      }

      resources {
        memory = 128
      }
    }
  }
}
