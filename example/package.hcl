# Configuration of an agent for the Debian package of the driver: copy it to /etc/nomad.d/nspawn.hcl.
#
# An agent has one plugin_dir. If yours has one already, leave that line out, and make a link in your directory:
#
#     sudo ln -s /usr/lib/nomad/plugins/nomad-driver-nspawn /opt/nomad/plugins/

plugin_dir = "/usr/lib/nomad/plugins"

plugin "nomad-driver-nspawn" {
  config {
  }
}
