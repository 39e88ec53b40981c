# The image of nginx.hcl, as a directory in /var/lib/machines. As root: sh example/nginx/image.sh
# Like everything below a plugin directory it has no execute bit.
set -eu
mkdir -p -m 700 /var/lib/machines
mmdebstrap --variant=minbase --include=nginx-light bookworm /var/lib/machines/nginx
