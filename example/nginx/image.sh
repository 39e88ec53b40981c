# Makes the image of nginx.hcl, a directory in /var/lib/machines. Run it as root: sudo sh example/nginx/image.sh
# It has no execute bit, like everything in a directory that an agent may use as its plugin directory.
set -eu
mkdir -p -m 700 /var/lib/machines
mmdebstrap --variant=minbase --include=nginx-light bookworm /var/lib/machines/nginx
