# Configuration of an agent whose jobs come from people it does not trust with the host:
#
#     sudo nomad agent -config=example/hardened.hcl ...
#
# What each of these protects is said in the README, "What the operator allows".
plugin "nomad-driver-nspawn" {
  config {
    # Nothing that opens the host: not its network, users, devices, and no file systems of the job's making.
    allow = []

    # In the container's own network, which is not the host's, and its own user namespace.
    allow_caps = ["CAP_NET_ADMIN"]

    # What jobs may mount beside Nomad's volumes and their own directories.
    allow_paths = ["/srv", "/etc/ssl/certs"]

    # Images by name come from here. Those that jobs bring along in their own directories are theirs.
    image_dir = "/srv/images"
  }
}
