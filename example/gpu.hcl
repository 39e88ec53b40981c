# A command with a GPU of NVIDIA: a CDI file says which device nodes, libraries and programs the container gets.
#
# It uses the image of debian.hcl: nvidia-smi and the libraries are the host's. As root on the client, with NVIDIA's
# driver and the package nvidia-container-toolkit, this writes the file:
#
#     nvidia-ctk cdi generate --format=json --disable-hook=disable-device-node-modification --output=/etc/cdi/nvidia.json
#
# The job needs the permission devices: allow = ["default", "devices"] in the plugin's block.
job "gpu" {
  type = "batch"

  group "gpu" {
    task "gpu" {
      driver = "nspawn"

      config {
        image   = "debian"
        boot    = false
        command = ["nvidia-smi"]

        # The hooks in the file prepare the container's root, so it must be the task's own.
        ephemeral = true

        devices {
          host_path = "nvidia.com/gpu=0" # `nomad-driver-nspawn check` lists the names
        }
      }

      resources {
        cpu    = 100
        memory = 256
      }
    }
  }
}
