# A system that is downloaded: the client needs no image before.
#
# Any web server will do. As root, this makes an archive of the image of debian.hcl, and serves it:
#
#     tar --numeric-owner --xattrs -cJf debian.tar.xz -C /var/lib/machines/debian .
#     python3 -m http.server --bind 127.0.0.1 8000
job "download" {
  type = "batch"

  group "download" {
    task "download" {
      driver = "nspawn"

      config {
        # The client needs no image of this name. If it has one in /var/lib/machines, that one is used.
        image = "fetched-debian"

        # It is fetched once for any number of tasks. Each task gets a private root over it. Give a checksum if the
        # server is not your own.
        image_download {
          url  = "http://127.0.0.1:8000/debian.tar.xz"
          type = "tar"
        }

        boot    = false
        command = ["/bin/sh", "-c", "echo A root of my own; touch /usr/mine; ls /usr"]
      }
    }
  }
}
