# engines.sh DOCKER-DATA MODE REGISTRY: a container engine in a privileged container. Prints a line
# per check. MODE: `full`, `brief` (storage driver and one container) or `podman`.
set -u
data=$1 mode=$2 registry=$3
# Processes leave the cgroup that is to have children (cgroups(7), "no internal processes").
if [ "$(cat /proc/self/cgroup)" = 0::/ ]; then
    mkdir -p /sys/fs/cgroup/init
    for pid in $(cat /sys/fs/cgroup/cgroup.procs); do
        echo "$pid" > /sys/fs/cgroup/init/cgroup.procs 2> /dev/null
    done
    sed -e 's/ / +/g' -e 's/^/+/' < /sys/fs/cgroup/cgroup.controllers \
        > /sys/fs/cgroup/cgroup.subtree_control
fi
image=$registry/busybox
mkdir -p /tmp/build
cat > /tmp/build/Dockerfile <<X
FROM $image
RUN mkdir /www && echo built > /www/index.html
CMD ["httpd", "-f", "-p", "80", "-h", "/www"]
X
retry() {
    tries=0
    until "$@" 2> /dev/null; do
        tries=$((tries + 1)); [ $tries -lt 60 ] || { echo "gave up: $*"; return 1; }; sleep 0.5
    done
}

if [ "$mode" = podman ]; then
    podman() { command podman --cgroup-manager=cgroupfs --events-backend=none "$@"; }
    podman info --format 'driver {{.Store.GraphDriverName}}'
    podman build -q --tls-verify=false --isolation=oci -t web /tmp/build > /dev/null && echo built
    podman run --rm --memory 32m web cat /sys/fs/cgroup/memory.max
    podman run -d --name web -p 8080:80 web > /dev/null
    address=$(podman inspect --format '{{.NetworkSettings.IPAddress}}' web)
    retry podman run --rm web wget -q -O - "http://$address/"
    podman exec web cat /www/index.html
    podman rm -f -t 0 web > /dev/null
    echo "left $(podman ps -aq | wc -l)"
    exit
fi

dockerd --data-root "$data" --insecure-registry "$registry" > /var/log/dockerd.log 2>&1 &
daemon=$!
tries=0
until docker info > /dev/null 2>&1; do
    tries=$((tries + 1))
    [ $tries -lt 240 ] || { tail -n 5 /var/log/dockerd.log; exit 1; }
    sleep 0.5
done
docker info --format 'driver {{.Driver}}, cgroup {{.CgroupVersion}}'
docker pull -q "$image" > /dev/null && echo pulled
docker run --rm --memory 32m "$image" cat /sys/fs/cgroup/memory.max
if [ "$mode" = full ]; then
    DOCKER_BUILDKIT=0 docker build -q -t classic /tmp/build > /dev/null && echo built
    DOCKER_BUILDKIT=1 docker build -q -t web /tmp/build > /dev/null && echo "built by BuildKit"
    docker network create net > /dev/null
    docker run -d --name web --network net -p 8080:80 web > /dev/null
    retry docker run --rm --network net "$image" wget -q -O - http://web/
    docker run --rm --network host "$image" wget -q -O - http://127.0.0.1:8080/
    docker exec web sh -c 'echo by-exec > /www/x; cat /www/x'
    docker rm -f web > /dev/null
fi
echo "left $(docker ps -aq | wc -l)"
kill $daemon
wait $daemon
