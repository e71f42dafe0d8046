"""The part of the custom resources' schemas that the manifests use, as JSON Schema: names, types, what must and may be.

Written by hand, and compared on 2026-11-22: every name in the manifests, down to the containers, is a field of the
generated models in the packages kubeflow-training 1.9.4 (PyTorchJob) and kubernetes 34.1 (pods), with its type; RayJob's
own fields and `authOptions` are those of KubeRay's sources and field reference, read by eye. The packages are not
installed for the tests: they pin others. Objects take no other names, so a misspelt one is found; names that the
manifests do not use are left out, apart from those that one would confuse them with.
"""

from typing import Any

TEXT, WHOLE, FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
QUANTITY = {"anyOf": [{"type": "string", "pattern": r"^[0-9.]+(m|Ki|Mi|Gi|Ti|k|M|G|T)?$"}, WHOLE]}
TEXTS = {"type": "object", "additionalProperties": TEXT}


def array(item: dict[str, Any], low: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": low}


def one_of(*values: str) -> dict[str, Any]:
    return {"enum": list(values)}


def fields(required: str = "", **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required.split(), "additionalProperties": False}


METADATA = fields(name=TEXT, generateName=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS)
QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}
CONTAINER = fields(
    "name image",
    name=TEXT,
    image=TEXT,
    imagePullPolicy=one_of("Always", "IfNotPresent", "Never"),
    command=array(TEXT),
    args=array(TEXT),
    workingDir=TEXT,
    env=array(fields("name", name=TEXT, value=TEXT, valueFrom={"type": "object"})),
    ports=array(fields("containerPort", name=TEXT, containerPort=WHOLE)),
    resources=fields(limits=QUANTITIES, requests=QUANTITIES),
    volumeMounts=array(fields("name mountPath", name=TEXT, mountPath=TEXT, readOnly=FLAG, subPath=TEXT)),
)
VOLUME = fields(
    "name",
    name=TEXT,
    persistentVolumeClaim=fields("claimName", claimName=TEXT, readOnly=FLAG),
    emptyDir=fields(medium=TEXT, sizeLimit=QUANTITY),
    hostPath=fields("path", path=TEXT, type=TEXT),
)
POD = fields(
    "spec",
    metadata=METADATA,
    spec=fields(
        "containers",
        containers=array(CONTAINER, low=1),
        volumes=array(VOLUME),
        restartPolicy=one_of("Always", "OnFailure", "Never"),
        nodeSelector=TEXTS,
        hostNetwork=FLAG,
    ),
)


def resource(version: str, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    return fields(
        "apiVersion kind metadata spec", apiVersion=one_of(version), kind=one_of(kind), metadata=METADATA, spec=spec
    )


RAY_JOB = resource(
    "ray.io/v1",
    "RayJob",
    fields(
        entrypoint=TEXT,
        runtimeEnvYAML=TEXT,
        submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
        backoffLimit=WHOLE,
        activeDeadlineSeconds=WHOLE,
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=WHOLE,
        suspend=FLAG,
        rayClusterSpec=fields(
            "headGroupSpec",
            rayVersion=TEXT,
            authOptions=fields(mode=one_of("disabled", "token"), secretName=TEXT),
            enableInTreeAutoscaling=FLAG,
            headGroupSpec=fields("template", rayStartParams=TEXTS, serviceType=TEXT, template=POD),
            workerGroupSpecs=array(
                fields(
                    "groupName maxReplicas minReplicas template",
                    groupName=TEXT,
                    replicas=WHOLE,
                    minReplicas=WHOLE,
                    maxReplicas=WHOLE,
                    numOfHosts=WHOLE,
                    rayStartParams=TEXTS,
                    template=POD,
                )
            ),
        ),
    ),
)
REPLICA = fields(replicas=WHOLE, restartPolicy=one_of("Always", "OnFailure", "Never", "ExitCode"), template=POD)
PYTORCH_JOB = resource(
    "kubeflow.org/v1",
    "PyTorchJob",
    fields(
        "pytorchReplicaSpecs",
        nprocPerNode=TEXT,
        runPolicy=fields(
            activeDeadlineSeconds=WHOLE,
            backoffLimit=WHOLE,
            cleanPodPolicy=one_of("All", "Running", "None"),
            suspend=FLAG,
            ttlSecondsAfterFinished=WHOLE,
        ),
        pytorchReplicaSpecs=fields(Master=REPLICA, Worker=REPLICA),
    ),
)
