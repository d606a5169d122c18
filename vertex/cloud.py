"""All that is said to Google's APIs, and what their errors mean here. Every call has a deadline."""

import contextlib
import datetime
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import google.auth
import requests
from google.api_core import exceptions
from google.auth import exceptions as auth_exceptions
from google.auth.transport.requests import AuthorizedSession
from google.cloud import aiplatform_v1, storage
from google.protobuf import json_format

from vertex.settings import Settings

SCOPE = "https://www.googleapis.com/auth/cloud-platform"
LOGGING = "https://logging.googleapis.com"
CALL_S = 60
DEPLOY_S = 3600  # a machine, an image and a bundle: mostly ten to twenty minutes
CONSOLE = "https://console.cloud.google.com/logs/query"
QUOTAS = "https://console.cloud.google.com/iam-admin/quotas"
PASSING = (
    exceptions.ServerError,
    exceptions.TooManyRequests,
    exceptions.RetryError,
    auth_exceptions.TransportError,
    requests.ConnectionError,
    requests.Timeout,
)
Json = dict[str, Any]


class CloudError(Exception):
    """What Vertex AI or the bucket did not do, where its logs are, and what to do about it."""


class MissingError(CloudError):
    """Something that is not there."""


class PassingError(CloudError):
    """One that may be over at the next try: a service or a connection that is down for a moment."""


class Cloud:
    """The APIs of one project and region. `endpoint`: another address of all of them, for tests."""

    def __init__(self, settings: Settings, endpoint: str = "") -> None:
        self.settings, self.endpoint = settings, endpoint

    @cached_property
    def credentials(self) -> Any:
        with self.explained("logging in"):
            return google.auth.default(scopes=[SCOPE])[0]

    @cached_property
    def _options(self) -> Json:
        address = self.endpoint or f"{self.settings.region}-aiplatform.googleapis.com"
        return {"credentials": self.credentials, "transport": "rest", "client_options": {"api_endpoint": address}}

    @cached_property
    def _jobs(self) -> Any:
        return aiplatform_v1.JobServiceClient(**self._options)

    @cached_property
    def _endpoints(self) -> Any:
        return aiplatform_v1.EndpointServiceClient(**self._options)

    @cached_property
    def _pipelines(self) -> Any:
        return aiplatform_v1.PipelineServiceClient(**self._options)

    @cached_property
    def storage(self) -> Any:
        """The bucket's client, which STORAGE_EMULATOR_HOST leads elsewhere."""
        return storage.Client(project=self.settings.project, credentials=self.credentials)

    def submit(self, job: Json) -> str:
        """A CustomJob or a HyperparameterTuningJob, as vertex.spec makes it -> its resource name."""
        parent, kind = self.settings.parent, "custom_job" if "jobSpec" in job else "hyperparameter_tuning_job"
        with self.explained(f"submitting {job['displayName']}"):
            made = aiplatform_v1.CustomJob if kind == "custom_job" else aiplatform_v1.HyperparameterTuningJob
            call = getattr(self._jobs, f"create_{kind}")
            return str(call(parent=parent, timeout=CALL_S, **{kind: _message(made, job)}).name)

    def job(self, name: str) -> Json:
        """The job as it is now."""
        kind = "custom_job" if "/customJobs/" in name else "hyperparameter_tuning_job"
        with self.explained(f"asking for {name}"):
            return _plain(getattr(self._jobs, f"get_{kind}")(name=name, timeout=CALL_S))

    def submit_pipeline(self, job: Json, number: str) -> str:
        """A PipelineJob under an id of ours -> its resource name.

        Not by aiplatform.PipelineJob, whose submit() first asks Resource Manager whose the bucket is: one more API.
        """
        with self.explained(f"submitting {number}"):
            made = _message(aiplatform_v1.PipelineJob, job)
            request = {"parent": self.settings.parent, "pipeline_job": made, "pipeline_job_id": number}
            return str(self._pipelines.create_pipeline_job(timeout=CALL_S, **request).name)

    def pipeline(self, name: str) -> Json:
        """The PipelineJob as it is now."""
        with self.explained(f"asking for {name}"):
            return _plain(self._pipelines.get_pipeline_job(name=name, timeout=CALL_S))

    def recent(self, limit: int = 10) -> list[Json]:
        """The last jobs, tuning jobs and endpoints of the region, newest first."""
        parent, found = self.settings.parent, list[Json]()
        with self.explained(f"asking for the jobs of {self.settings.project}"):
            for call in (
                self._jobs.list_custom_jobs,
                self._jobs.list_hyperparameter_tuning_jobs,
                self._endpoints.list_endpoints,
            ):
                answer = call(request={"parent": parent, "page_size": limit}, timeout=CALL_S)
                found += [_plain(one) for one, _ in zip(answer, range(limit), strict=False)]
        return sorted(found, key=lambda one: str(one["createTime"]), reverse=True)

    def logs(self, name: str, since: str) -> list[Json]:
        """The job's log entries from `since` on, a timestamp, oldest first; at most a thousand.

        https://docs.cloud.google.com/logging/docs/reference/v2/rest/v2/entries/list
        """
        wanted = f'resource.type="ml_job" AND resource.labels.job_id="{name.rpartition("/")[2]}"'
        body = {
            "resourceNames": [f"projects/{self.settings.project}"],
            "filter": f'{wanted} AND timestamp>="{since}"',
            "orderBy": "timestamp asc",
            "pageSize": 1000,
        }
        with self.explained("reading the logs"):
            session = AuthorizedSession(self.credentials)
            answer = session.post(f"{self.endpoint or LOGGING}/v2/entries:list", json=body, timeout=CALL_S)
            if not answer.ok:
                raise exceptions.from_http_response(answer)
            entries: list[Json] = answer.json().get("entries", [])
            return entries

    def upload_model(self, model: Json) -> str:
        """A Model into the registry -> its resource name."""
        with self.explained(f"registering {model['displayName']}"):
            client = aiplatform_v1.ModelServiceClient(**self._options)
            message = _message(aiplatform_v1.Model, model)
            operation = client.upload_model(parent=self.settings.parent, model=message, timeout=CALL_S)
            return str(operation.result(timeout=DEPLOY_S).model)

    def endpoint_named(self, name: str) -> str:
        """The endpoint of this name, made where there is none -> its resource name."""
        parent = self.settings.parent
        with self.explained(f"making the endpoint {name}"):
            request = {"parent": parent, "filter": f'display_name="{name}"'}
            for found in self._endpoints.list_endpoints(request=request, timeout=CALL_S):
                return str(found.name)
            endpoint = _message(aiplatform_v1.Endpoint, {"displayName": name, "labels": self.settings.label_map})
            operation = self._endpoints.create_endpoint(parent=parent, endpoint=endpoint, timeout=CALL_S)
            return str(operation.result(timeout=DEPLOY_S).name)

    def deploy(self, endpoint: str, deployed: Json) -> None:
        """All traffic to this DeployedModel; what served before goes once it serves."""
        client = self._endpoints
        with self.explained(f"deploying {deployed['displayName']}"):
            before = [one.id for one in client.get_endpoint(name=endpoint, timeout=CALL_S).deployed_models]
            message = _message(aiplatform_v1.DeployedModel, deployed)
            split = {"0": 100, **dict.fromkeys(before, 0)}  # "0" is the one that comes
            request = {"endpoint": endpoint, "deployed_model": message, "traffic_split": split}
            try:
                client.deploy_model(request=request, timeout=CALL_S).result(timeout=DEPLOY_S)
            except exceptions.GoogleAPICallError as exc:
                query = (
                    f"resource.labels.endpoint_id%3D%22{endpoint.rpartition('/')[2]}%22?project={self.settings.project}"
                )
                where = f"what served before goes on; the container's logs: {CONSOLE};query={query}"
                raise CloudError(f"deploying {deployed['displayName']}: failed ({_short(exc)}); {where}") from exc
            for old in before:
                client.undeploy_model(endpoint=endpoint, deployed_model_id=old, timeout=CALL_S).result(timeout=DEPLOY_S)

    @contextlib.contextmanager
    def explained(self, doing: str) -> Iterator[None]:
        """Errors of Google's libraries as CloudErrors that say what to do. `doing`: what was being done."""
        try:
            yield
        except (auth_exceptions.DefaultCredentialsError, auth_exceptions.RefreshError) as exc:
            raise CloudError(f"{doing}: you are not logged in, or no longer ({_short(exc)}): {LOGIN}") from exc
        except exceptions.Unauthorized as exc:
            raise CloudError(f"{doing}: your login is not valid any more ({_short(exc)}): {LOGIN}") from exc
        except exceptions.TooManyRequests as exc:
            if "quota" not in str(exc).lower():
                raise PassingError(f"{doing}: too many requests at once ({_short(exc)})") from exc
            raise CloudError(
                f"{doing}: over the project's quota ({_short(exc)}): ask for more at {QUOTAS}?project="
                f"{self.settings.project}, take fewer or other GPUs, another REGION, or spot and flex-start, which "
                "have a quota of their own"
            ) from exc
        except PASSING as exc:
            raise PassingError(f"{doing}: Google did not answer ({_short(exc)}): the same command tries again") from exc
        except exceptions.Forbidden as exc:
            raise CloudError(f"{doing}: not allowed ({_short(exc)}): {self._rights(str(exc))}") from exc
        except exceptions.NotFound as exc:
            raise MissingError(f"{doing}: not there ({_short(exc)}): {self._missing(str(exc))}") from exc
        except exceptions.GoogleAPICallError as exc:
            raise CloudError(f"{doing}: refused ({_short(exc)})") from exc
        except (auth_exceptions.GoogleAuthError, requests.RequestException) as exc:
            raise CloudError(f"{doing}: {_short(exc)}") from exc

    def _rights(self, text: str) -> str:
        s = self.settings
        if "disabled" in text or "has not been used" in text:
            return f"switch the API on: gcloud services enable aiplatform.googleapis.com --project={s.project}"
        role = "roles/storage.objectAdmin" if "storage" in text else "roles/aiplatform.user"
        return (
            f"whoever owns {s.project} gives the right with: gcloud projects add-iam-policy-binding {s.project} "
            f"--member=user:YOU@EXAMPLE.COM --role={role}"
        )

    def _missing(self, text: str) -> str:
        s = self.settings
        if "bucket" in text.lower() or "/b/" in text:
            return (
                f"check BUCKET, or make it: gcloud storage buckets create gs://{s.bucket} --location={s.region} "
                f"--project={s.project} --uniform-bucket-level-access"
            )
        return f"check PROJECT={s.project} and REGION={s.region}"


LOGIN = "gcloud auth application-default login"


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _message(kind: Any, value: Json) -> Any:
    return kind.wrap(json_format.ParseDict(value, kind.pb(kind())))


def _plain(message: Any) -> Json:
    plain: Json = json_format.MessageToDict(type(message).pb(message), always_print_fields_with_no_presence=False)
    return plain


def _short(exc: Exception) -> str:
    """An error's own words, without the address that was asked."""
    text = getattr(exc, "message", "") or str(exc)
    return re.sub(r"^[A-Z]+ https?://\S+: ", "", " ".join(text.split()))[:500] or type(exc).__name__
