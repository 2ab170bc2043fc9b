# Runs before a worker pod is stopped. Its routers are told, connections go elsewhere, and each of them answers what it has.
# They say so by files: deployments/xloom/router/draining.py.
folder=/tmp/xloom-routers-$(id -u)/__PORT__
busy() {
  for file in "$folder"/[0-9]*; do
    [ -e "$file" ] && [ -d "/proc/${file##*/}" ] && return 0
  done
  return 1
}
busy || exit 0
touch "$folder/drain"
sleep 5
end=$(($(date +%s) + __DRAIN__))
while busy && [ "$(date +%s)" -lt "$end" ]; do
  sleep 1
done
