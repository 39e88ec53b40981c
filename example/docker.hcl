# An image from a registry. A layer is fetched once for all images that have it. The task runs on a private root over
# the layers, and what it changes is deleted when it ends.
job "docker" {
  group "docker" {
    task "web" {
      driver = "nspawn"

      config {
        image = "docker://docker.io/library/nginx:1.27"

        # Such images hold one program and no init. The image itself names the program and its variables, user and
        # directory. args = [...] would follow its Entrypoint in place of Cmd; command = [...] would replace both.
        boot = false

        # Credentials for a private registry. The operator can give them for all jobs, too, in the plugin's block.
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
