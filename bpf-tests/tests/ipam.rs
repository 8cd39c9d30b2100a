//! Pods whose addresses another plugin gives: a small one of this test, run by ours as a runtime would run it.
#![forbid(unsafe_code)]

use std::{fs, net::IpAddr, path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result, anyhow, ensure};
use bpf_tests::{
    agent::Agent,
    checks::tally,
    cluster::{Cluster, Family},
    cni::{self, Answer, Container, Runtime},
    netns::Netns,
    pod::HTTP_PORT,
    runner,
    sandbox::Sandbox,
};
use serde_json::{Value, json};

fn main() -> ExitCode {
    runner::main(&[
        ("delegated_addresses_are_served_checked_and_given_back", served_checked_and_given_back),
        ("delegated_rules_59_and_60_errors_are_passed_on_and_nothing_is_kept", errors_are_passed_on),
    ])
}

/// Gives 10.77.0.N and fd00:77::N, one file a container, and notes what it was asked. `fail-ADD` makes ADD fail, and so on.
const PLUGIN: &str = r#"#!/bin/sh
cd "$(dirname "$0")/../scratch" || exit 1
cat > config
echo "$CNI_COMMAND ${CNI_CONTAINERID:--}" >> log
if [ -e "fail-$CNI_COMMAND" ]; then
    echo '{"cniVersion": "1.1.0", "code": 142, "msg": "the cloud has none", "details": "subnet-7"}'
    exit 1
fi
case "$CNI_COMMAND" in
ADD)
    n=2
    while ! ( set -C; echo "$CNI_CONTAINERID" > "given-$n" ) 2> taken; do n=$((n + 1)); done
    [ -e same ] && n=2
    echo '{"cniVersion": "1.1.0", "ips": [{"address": "10.77.0.'$n'/24", "gateway": "10.77.0.1"},'
    echo '{"address": "fd00:77::'$n'/64"}], "dns": {"nameservers": ["10.77.0.53"]}}' ;;
DEL) for file in given-*; do [ "$(cat "$file")" = "$CNI_CONTAINERID" ] && rm "$file"; done; exit 0 ;;
CHECK) grep -q . given-* ;;
esac
"#;
const NAME: &str = "test-ipam";

struct Fixture {
    agent: Agent,
    runtime: Runtime,
    scratch: PathBuf,
    cluster: Cluster,
}

impl Fixture {
    /// A node without a range of its own for pods.
    fn test(sandbox: &Sandbox, test: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let cluster = Cluster::with_pods(sandbox, &["a"], 0)?;
        let node = &cluster.nodes()[0];
        let object = json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": { "name": node.name },
            "status": { "addresses": [{ "type": "InternalIP", "address": node.v4 }] },
        });
        cluster.manifests().write("cluster", &object.to_string())?;
        let runtime = Runtime::new(node)?;
        runtime.install(NAME, PLUGIN)?;
        let scratch = runtime.scratch()?;
        let mut args = runtime.agent_args();
        args.push(format!("--cni-ipam={}", json!({ "type": NAME, "pool": "p1" })));
        let agent = Agent::start(node, &args.iter().map(String::as_str).collect::<Vec<_>>())?;
        runtime.wait_ready()?;
        let mut fixture = Self { agent, runtime, scratch, cluster };
        test(&mut fixture).map_err(|error| anyhow!("{error:#}\n{}", fixture.agent.log_tail()))
    }

    /// The addresses that the plugin has given and not got back.
    fn given(&self) -> Result<usize> {
        let names = fs::read_dir(&self.scratch)?.map(|entry| Ok(entry?.file_name()));
        let names = names.collect::<Result<Vec<_>>>()?;
        Ok(names.iter().filter(|name| name.to_string_lossy().starts_with("given-")).count())
    }

    fn set(&self, switch: &str) -> Result<()> {
        fs::write(self.scratch.join(switch), "").with_context(|| switch.to_owned())
    }

    fn clear(&self, switch: &str) -> Result<()> {
        fs::remove_file(self.scratch.join(switch)).with_context(|| switch.to_owned())
    }

    fn log(&self) -> Result<String> {
        fs::read_to_string(self.scratch.join("log")).context("what the plugin noted")
    }

    fn add(&self, id: &str) -> Result<(Netns, Answer)> {
        let netns = Netns::new(id)?;
        let path = netns.path()?;
        let answer = self.runtime.command("ADD", Container { id, netns: cni::path(&path)? }, json!({}))?;
        Ok((netns, answer))
    }

    fn plain(&self, command: &str, more: Value) -> Result<Answer> {
        self.runtime.run(&[("CNI_COMMAND", command)], &self.runtime.config("1.1.0", more)?.to_string())
    }
}

fn served_checked_and_given_back(sandbox: &Sandbox) -> Result<()> {
    Fixture::test(sandbox, |it| {
        for name in ["a1", "a2"] {
            it.cluster.attach("a", name, &it.runtime)?;
        }
        let config: Value = serde_json::from_slice(&fs::read(it.scratch.join("config"))?)?;
        ensure!(config["ipam"]["pool"] == "p1" && config["name"] == "ferroflow", "{config}");
        for family in Family::BOTH {
            let (from, to) = (it.cluster.pod("a1"), it.cluster.pod("a2"));
            let expected: IpAddr = if family == Family::V4 { "10.77.0.3" } else { "fd00:77::3" }.parse()?;
            ensure!(to.ip(family) == expected, "{}", to.ip(family));
            let target = (to.ip(family), HTTP_PORT).into();
            tally(&from.http(target, 3)?, target, from.ip(family))?;
        }
        ensure!(it.given()? == 2 && it.runtime.leases()?.len() == 2, "{}", it.given()?);
        it.agent.kill9()?;
        it.agent.restart()?;
        it.agent.wait_synced()?;
        let (netns, answer) = it.add("third")?;
        let result = answer.result()?;
        ensure!(cni::addresses(&result) == ["10.77.0.4", "fd00:77::4"], "{result}");
        ensure!(result["dns"]["nameservers"][0] == "10.77.0.53", "{result}");
        let path = netns.path()?;
        let checked = it.runtime.check(Container { id: "third", netns: cni::path(&path)? }, &result)?;
        ensure!(checked.success && it.log()?.contains("CHECK third"), "{checked:?}");
        it.set("fail-CHECK")?;
        let checked = it.runtime.check(Container { id: "third", netns: cni::path(&path)? }, &result)?;
        ensure!(checked.code()? == 142, "{checked:?}");
        for name in ["a1", "a2", "third"] {
            it.runtime.del(Container { id: name, netns: "" })?;
        }
        ensure!(it.given()? == 0 && it.runtime.leases()?.is_empty(), "something is kept");
        Ok(())
    })
}

fn errors_are_passed_on(sandbox: &Sandbox) -> Result<()> {
    Fixture::test(sandbox, |it| {
        ensure!(it.plain("STATUS", json!({}))?.success, "STATUS without a range of the node's own");
        let (_held, answer) = it.add("first")?;
        answer.result()?;
        for command in ["ADD", "DEL", "STATUS", "GC"] {
            it.set(&format!("fail-{command}"))?;
        }
        let valid =
            json!({ "cni.dev/valid-attachments": [{ "containerID": "first", "ifname": cni::IFNAME }] });
        let (netns, refused) = it.add("second")?;
        let failed = [
            refused,
            it.runtime.command("DEL", Container { id: "never", netns: "" }, json!({}))?,
            it.plain("STATUS", json!({}))?,
            it.plain("GC", valid.clone())?,
        ];
        for answer in failed {
            ensure!(answer.code()? == 142 && answer.text.contains("subnet-7"), "{answer:?}");
        }
        ensure!(netns.interfaces()? == ["lo"], "something is left");
        for command in ["ADD", "DEL", "STATUS", "GC"] {
            it.clear(&format!("fail-{command}"))?;
        }
        ensure!(it.plain("GC", valid)?.success && it.log()?.contains("GC -"), "GC");
        // It gives what another has: the agent refuses, and it gets it back.
        it.set("same")?;
        let (netns, answer) = it.add("third")?;
        ensure!(answer.code()? == 104 && answer.text.contains("container first"), "{answer:?}");
        ensure!(netns.interfaces()? == ["lo"] && it.given()? == 1, "{} given", it.given()?);
        fs::remove_file(it.scratch.join("../bin").join(NAME))?;
        let (_netns, answer) = it.add("fourth")?;
        ensure!(answer.code()? == 4 && answer.text.contains("ipam.type"), "{answer:?}");
        Ok(())
    })
}
