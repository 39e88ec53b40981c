# Configuration of an agent for jobs from people whom the operator does not trust with the host: no job may use what
# opens the host. docs/options.md says under "Permissions" what each permission opens. Add to these lists what your jobs
# need.
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
