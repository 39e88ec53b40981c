# Configuration of an agent whose jobs come from people it does not trust with the host: nothing that opens it. What
# each permission opens is said in the README, "Permissions"; add to these lists what your jobs need.
#
#     sudo nomad agent -config=example/hardened.hcl ...

plugin "nomad-driver-nspawn" {
  config {
    allow       = []    # nothing that opens the host
    allow_caps  = []    # no capabilities beside the usual ones
    allow_paths = []    # no path of the host
    volumes     = false # nor Nomad's volumes
  }
}
