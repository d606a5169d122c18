# Kennel on GKE, by the settings of one file.
GKE_ENV ?= k8s/gke.env
GKE = @GKE_ENV="$(GKE_ENV)" DOCKER="$(DOCKER)" \
  GATEWAY_IMAGE=kennel/gateway:$(VERSION) MODEL_SERVER_IMAGE=kennel/model-server:$(TAG) bash k8s/gke.sh

.PHONY: gke-up
gke-up: ## cluster, image repository, bucket, address and rights on GKE, by the settings in k8s/gke.env
	$(GKE) up

.PHONY: gke-deploy
gke-deploy: ## push the images that `make images` built, apply, wait until they serve
	$(GKE) deploy

.PHONY: gke-down
gke-down: ## remove what gke-up made, after asking; YES=1 does not ask, BUCKET_TOO=1 takes the models with it
	$(GKE) down
