"""Helm as a library: reads what to do as JSON, writes what came of it as JSON. All judgement is the caller's."""

import json
import sys

import helm_python as helm


def render(chart, case):
    try:
        return {"manifests": chart.render(case, name="ferroflow", namespace="kube-system")}
    except helm.HelmError as error:
        return {"error": str(error)}


def main():
    helm.disable_logging()
    asked = json.load(sys.stdin)
    with helm.Chart.load(asked["chart"]) as chart:
        answer = {
            "helm": helm.helm_sdk_version(),
            "defaults": chart.values,
            "rendered": [render(chart, case) for case in asked["cases"]],
            "lint": helm.lint(asked["chart"], asked["cases"][0], strict=True)["messages"],
            "package": helm.package(asked["chart"], destination=asked["out"]),
        }
    json.dump(answer, sys.stdout)


main()
