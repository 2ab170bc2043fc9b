# Runs before a worker pod is stopped. New connections go elsewhere after a few seconds; then those that are left end.
sleep 5
end=$(($(date +%s) + __DRAIN__))
while [ "$(date +%s)" -lt "$end" ]; do
  wget -q -T 2 -O - http://127.0.0.1:__PORT__/metrics 2>/dev/null | grep -qE '^xloom_router_in_flight(\{[^}]*\})? [1-9]' || exit 0
  sleep 1
done
