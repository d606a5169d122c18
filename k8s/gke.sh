#!/usr/bin/env bash
# `make gke-up`, `make gke-deploy`, `make gke-down`: Kennel on GKE, by the settings in $GKE_ENV.
# Each may be run again: what is there already is left as it is.
set -euo pipefail
door=${1:?up, deploy or down}
settings=(PROJECT REGION MODE CLUSTER REPOSITORY BUCKET DOMAIN MODEL_URI MODELS)

say() { echo "gke-$door: $*"; }
stop() { say "$*" >&2; exit 1; }

need() {  # program, how to get it
  command -v "$1" >/dev/null || stop "needs $1: $2"
}

again() {  # IAM knows a new account only after some seconds
  local i
  for i in 1 2 3 4 5 6; do
    "$@" >/dev/null 2>&1 && return
    sleep "${PAUSE:-5}"
  done
  "$@" >/dev/null
}

read_settings() {
  local key
  [[ -f $GKE_ENV ]] || stop "$GKE_ENV is not there: copy k8s/gke.env and fill it in"
  unset "${settings[@]}"  # the file alone counts
  [[ $GKE_ENV == */* ]] || GKE_ENV=./$GKE_ENV
  # shellcheck source=gke.env
  . "$GKE_ENV"
  for key in "${settings[@]}"; do
    case ${!key:-} in
      "") stop "$key is not set in $GKE_ENV" ;;
      *your-project* | *example.com*) stop "$key=${!key} in $GKE_ENV is the example: write yours" ;;
    esac
  done
  [[ $MODE == autopilot || $MODE == standard ]] || stop "MODE=$MODE in $GKE_ENV is neither autopilot nor standard"
}

up() {
  say "switching on the APIs of $PROJECT"
  gcloud services enable container.googleapis.com artifactregistry.googleapis.com compute.googleapis.com \
    storage.googleapis.com iam.googleapis.com --project="$PROJECT"

  say "image repository $REPOSITORY, bucket gs://$BUCKET, address $CLUSTER"
  gcloud artifacts repositories describe "$REPOSITORY" --location="$REGION" --project="$PROJECT" >/dev/null 2>&1 ||
    gcloud artifacts repositories create "$REPOSITORY" --location="$REGION" --project="$PROJECT" \
      --repository-format=docker
  gcloud storage buckets describe "gs://$BUCKET" --project="$PROJECT" >/dev/null 2>&1 ||
    gcloud storage buckets create "gs://$BUCKET" --location="$REGION" --project="$PROJECT" \
      --uniform-bucket-level-access --public-access-prevention
  gcloud compute addresses describe "$CLUSTER" --project="$PROJECT" --global >/dev/null 2>&1 ||
    gcloud compute addresses create "$CLUSTER" --project="$PROJECT" --global

  # The project's default account often may do too much, or, in newer organisations, not even pull an image.
  say "$nodes, as whom the nodes run: pulls images, writes logs and metrics"
  gcloud iam service-accounts describe "$nodes" --project="$PROJECT" >/dev/null 2>&1 ||
    gcloud iam service-accounts create "$CLUSTER-nodes" --project="$PROJECT"
  again gcloud projects add-iam-policy-binding "$PROJECT" --member="serviceAccount:$nodes" \
    --role=roles/container.defaultNodeServiceAccount --condition=None
  again gcloud artifacts repositories add-iam-policy-binding "$REPOSITORY" --location="$REGION" \
    --project="$PROJECT" --member="serviceAccount:$nodes" --role=roles/artifactregistry.reader

  if gcloud container clusters describe "$CLUSTER" --location="$REGION" --project="$PROJECT" >/dev/null 2>&1; then
    say "cluster $CLUSTER is there"
  elif [[ $MODE == autopilot ]]; then
    say "making cluster $CLUSTER in $REGION, autopilot: about ten minutes"
    gcloud container clusters create-auto "$CLUSTER" --location="$REGION" --project="$PROJECT" \
      --release-channel=regular --service-account="$nodes"
  else
    say "making cluster $CLUSTER in $REGION, one node a zone: about ten minutes"
    # Autopilot has these by itself: network policies that are obeyed, Workload Identity, managed Prometheus.
    gcloud container clusters create "$CLUSTER" --location="$REGION" --project="$PROJECT" \
      --release-channel=regular --service-account="$nodes" --workload-pool="$PROJECT.svc.id.goog" \
      --machine-type=e2-standard-4 --num-nodes=1 --total-min-nodes=2 --total-max-nodes=12 --enable-autoscaling \
      --enable-dataplane-v2 --enable-ip-alias --enable-managed-prometheus --shielded-secure-boot
  fi

  # By the Kubernetes account itself; its pool exists once the project has a cluster.
  say "letting the model servers read gs://$BUCKET"
  again gcloud storage buckets add-iam-policy-binding "gs://$BUCKET" --project="$PROJECT" \
    --member="$model_server" --role=roles/storage.objectViewer

  local address
  address=$(gcloud compute addresses describe "$CLUSTER" --project="$PROJECT" --format="value(address)" --global)
  say "done. Let $DOMAIN lead to $address (an A record), put a bundle behind $MODEL_URI, then: make gke-deploy"
}

deploy() {
  need "$DOCKER" "https://docs.docker.com/get-docker/"
  connect
  GATEWAY_TAG=$(tag_of "$GATEWAY_IMAGE")
  MODEL_SERVER_TAG=$(tag_of "$MODEL_SERVER_IMAGE")

  say "pushing the images, the model server's is 1 GB"
  gcloud auth configure-docker "$REGION-docker.pkg.dev" --quiet
  push "$GATEWAY_IMAGE" "gateway:$GATEWAY_TAG"
  push "$MODEL_SERVER_IMAGE" "model-server:$MODEL_SERVER_TAG"

  say "applying build/gke/overlays/gke to $context"
  render
  kubectl --context="$context" apply -k build/gke/overlays/gke

  say "waiting until the new pods serve; on new nodes that takes some minutes"
  local part
  for part in model-server gateway; do
    kubectl --context="$context" -n kennel rollout status "deployment/$part" --timeout=25m ||
      stop "$part did not become ready: what it says is in kubectl -n kennel logs -l app.kubernetes.io/name=$part \
--all-containers; pods from before keep serving, make rollback returns to them"
  done
  say "done: https://$DOMAIN (the first time, certificate and load balancer take up to an hour:" \
    "kubectl -n kennel describe managedcertificate kennel)"
}

down() {
  local answer bucket="its models stay" cluster=""
  [[ ${BUCKET_TOO:-} != 1 ]] || bucket="with every model in it"
  say "will delete in $PROJECT: cluster $CLUSTER, address $CLUSTER, image repository $REPOSITORY with all its" \
    "images, account $nodes; bucket gs://$BUCKET: $bucket"
  if [[ ${YES:-} != 1 ]]; then
    read -r -p "Type the cluster's name to go on: " answer || true
    [[ ${answer:-} == "$CLUSTER" ]] || stop "nothing was deleted"
  fi

  if gcloud container clusters describe "$CLUSTER" --location="$REGION" --project="$PROJECT" >/dev/null 2>&1; then
    connect
    # First, and by Kubernetes: a cluster that is deleted at once leaves its load balancer behind, at a price.
    say "taking the load balancer down: some minutes"
    kubectl --context="$context" delete namespace kennel --ignore-not-found --timeout=15m
    say "deleting cluster $CLUSTER: about five minutes"
    gcloud container clusters delete "$CLUSTER" --location="$REGION" --project="$PROJECT" --quiet
  fi
  say "deleting the rest"
  if gcloud compute addresses describe "$CLUSTER" --project="$PROJECT" --global >/dev/null 2>&1; then
    gcloud compute addresses delete "$CLUSTER" --project="$PROJECT" --global --quiet
  fi
  if gcloud artifacts repositories describe "$REPOSITORY" --location="$REGION" --project="$PROJECT" >/dev/null 2>&1; then
    gcloud artifacts repositories delete "$REPOSITORY" --location="$REGION" --project="$PROJECT" --quiet
  fi
  if gcloud iam service-accounts describe "$nodes" --project="$PROJECT" >/dev/null 2>&1; then
    gcloud projects remove-iam-policy-binding "$PROJECT" --member="serviceAccount:$nodes" \
      --role=roles/container.defaultNodeServiceAccount --condition=None >/dev/null
    gcloud iam service-accounts delete "$nodes" --project="$PROJECT" --quiet
  fi
  if gcloud storage buckets describe "gs://$BUCKET" --project="$PROJECT" >/dev/null 2>&1; then
    if [[ ${BUCKET_TOO:-} == 1 ]]; then
      gcloud storage rm "gs://$BUCKET" --project="$PROJECT" --recursive
    else
      gcloud storage buckets remove-iam-policy-binding "gs://$BUCKET" --project="$PROJECT" \
        --member="$model_server" --role=roles/storage.objectViewer >/dev/null 2>&1 || true  # it may be gone already
    fi
  fi
  say "done"
}

connect() {  # kubectl to this cluster, whatever the current context was
  need kubectl "https://kubernetes.io/docs/tasks/tools/"
  need gke-gcloud-auth-plugin "gcloud components install gke-gcloud-auth-plugin"
  gcloud container clusters get-credentials "$CLUSTER" --location="$REGION" --project="$PROJECT"
  context="gke_${PROJECT}_${REGION}_$CLUSTER"
}

tag_of() {  # image here -> its tag there: by content, so that other content always rolls
  local id architecture
  read -r id architecture < <("$DOCKER" image inspect --format '{{.Id}} {{.Architecture}}' "$1" 2>/dev/null) ||
    stop "$1 is not here: make images"
  [[ $architecture == amd64 ]] ||
    stop "$1 is for $architecture, the nodes are amd64: DOCKER_DEFAULT_PLATFORM=linux/amd64 make images"
  id=${id#sha256:}
  echo "${1##*:}-${id:0:12}"
}

push() {  # image here, name:tag there
  "$DOCKER" tag "$1" "$REGION-docker.pkg.dev/$PROJECT/$REPOSITORY/$2"
  "$DOCKER" push --quiet "$REGION-docker.pkg.dev/$PROJECT/$REPOSITORY/$2"
}

render() {  # k8s/ into build/gke, with the settings in the overlay
  local key file fill=()
  for key in "${settings[@]}" GATEWAY_TAG MODEL_SERVER_TAG; do
    fill+=(-e "s|\${$key}|$(sed 's/[\\&|]/\\&/g' <<<"${!key}")|g")
  done
  rm -rf build/gke
  mkdir -p build
  cp -R k8s build/gke
  for file in k8s/overlays/gke/*.yaml; do
    sed "${fill[@]}" "$file" >"build/gke/overlays/gke/${file##*/}"
  done
}

need gcloud "https://cloud.google.com/sdk/docs/install"
read_settings
number=$(gcloud projects describe "$PROJECT" --format="value(projectNumber)") ||
  stop "no access to $PROJECT: gcloud auth login, and check PROJECT in $GKE_ENV"
nodes="$CLUSTER-nodes@$PROJECT.iam.gserviceaccount.com"
model_server="principal://iam.googleapis.com/projects/$number/locations/global/workloadIdentityPools/$PROJECT.svc.id.goog"
model_server+="/subject/ns/kennel/sa/model-server"
case $door in
  up | deploy | down) "$door" ;;
  *) stop "there are up, deploy and down" ;;
esac
