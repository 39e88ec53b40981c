# A system that is fetched: the client needs no image of its own.
#
# Any web server will do. This makes an archive of the image of debian.hcl, and serves it:
#
#     tar --numeric-owner --xattrs -cJf debian.tar.xz -C /var/lib/machines/debian .
#     python3 -m http.server --bind 127.0.0.1 8000
job "download" {
  type = "batch"

  group "download" {
    task "download" {
      driver = "nspawn"

      config {
        # A name for people: nothing of it need be on the client. If there is such an image, that one is used.
        image = "fetched-debian"

        # Fetched once, however many tasks want it. Give a checksum where the server is not your own.
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
