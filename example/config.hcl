# Configuration of a Nomad agent for trying the driver out:
#
#     sudo nomad agent -dev -plugin-dir=$(pwd) -config=example/config.hcl
#
# -plugin-dir must be an absolute path. The agent starts every executable file in that directory as a plugin.
#
# With this block jobs may do all that jobs of the Go driver could, and so have the host. See hardened.hcl if others
# submit jobs.

# The label is the name of the file, not of the driver. Nomad 1.10 and later skip a plugin without such a block, even
# if there is nothing to configure.
plugin "nomad-driver-nspawn" {
  config {
  }
}

# Without this block Nomad 1.10.2 and later do not ask for the usage of tasks, and `nomad alloc status -stats` shows
# none. A -dev agent sets it by itself.
telemetry {
  publish_allocation_metrics = true
}
