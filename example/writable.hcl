# A system that is kept: the task writes to its image, and the changes are there when it starts again. It is made on
# purpose for one task: a second one that uses the image at the same time is refused.
#
# As root, this makes its image, a copy of that of debian.hcl:
#
#     cp -a --reflink=auto /var/lib/machines/debian /var/lib/machines/pet
#
# The job needs the permission image_write, which an empty plugin block gives. The image is on one client: with more
# than one, a constraint must keep the job there.
job "writable" {
  type = "service"

  group "writable" {
    # While the job is updated, the old task must have ended before the new one starts. Nomad does that if a group has
    # no update block with canaries, and a count of 1.
    task "pet" {
      driver = "nspawn"

      config {
        # No `ephemeral`, `volatile` or `read_only`: the root is the image itself.
        image       = "pet"
        boot        = false
        process_two = true
        command     = ["/bin/sh", "-c", "date >>/var/starts; cat /var/starts; exec sleep 1d"]
      }

      resources {
        cpu    = 100
        memory = 64
      }
    }
  }
}
