//! What else runs on the machine: other network plugins, kube-proxy, whoever has our ports.

use std::fs;
use std::path::Path;

use nix::sys::statvfs::{FsFlags, statvfs};

use super::{Finding, Grade, Subject};
use crate::health::server::PROXY_PORT;
use crate::kube_proxy;
use crate::lock::Lock;
use crate::node::{LOOPBACK, PLUGIN, Places};

/// Where kube-proxy's metrics are looked for, and the agent's.
const METRICS_PORT: u16 = 10249;

pub(super) fn findings(subject: &Subject) -> Vec<Finding> {
    let state = if Lock::is_held(&subject.bpffs.dir) { Agent::Runs } else { Agent::Rests };
    let mut findings =
        vec![agent(state), configurations(subject), plugin(subject), loopback(subject), kube_proxy()];
    findings.extend(directories(subject));
    findings.extend([PROXY_PORT, METRICS_PORT].map(|number| port(number, state)));
    findings
}

#[derive(Clone, Copy)]
enum Agent {
    Runs,
    Rests,
}

fn agent(state: Agent) -> Finding {
    match state {
        Agent::Runs => Finding::ok("agent", "running; `ferroflow status` says more"),
        Agent::Rests => Finding::warn(
            "agent",
            "not running",
            "start it, or see why it ended: kubectl logs --previous, or its log",
        ),
    }
}

/// A runtime takes the first file of the directory.
fn configurations(subject: &Subject) -> Finding {
    let dir = &subject.places.conf_dir;
    let found = match subject.places.configurations() {
        Ok(found) => found,
        Err(error) => {
            return Finding::fail(
                "cni",
                format!("{}: {error}", dir.display()),
                "make it readable, or name another with --cni-conf-dir",
            );
        }
    };
    let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let Some(first) = found.first() else {
        return Finding::ok(
            "cni",
            format!("{} is empty: an agent with --cni writes its file there", dir.display()),
        );
    };
    let others: Vec<_> = found.iter().filter(|it| !it.ours).map(|it| name(&it.path)).collect();
    if others.is_empty() {
        return Finding::ok("cni", name(&first.path));
    }
    if first.ours {
        return Finding::warn(
            "cni",
            format!("{} comes first; {} is another plugin's", name(&first.path), others.join(", ")),
            "it is not used: uninstall that plugin, or remove its file",
        );
    }
    Finding::fail(
        "cni",
        format!("{} comes first: pods are another plugin's", name(&first.path)),
        format!(
            "uninstall that plugin, or move {} out of {}; to keep it and have Services only: no --cni (chart: \
             cni.enabled=false)",
            others.join(", "),
            dir.display()
        ),
    )
}

fn plugin(subject: &Subject) -> Finding {
    let path = subject.places.bin_dir.join(PLUGIN);
    if path.is_file() {
        return Finding::ok("cni plugin", path.display().to_string());
    }
    if is_asked_for(subject) {
        Finding::fail(
            "cni plugin",
            format!("{} is missing, and the runtime is told to use it", path.display()),
            "ferroflow prepare --cni-bin-dir DIR, with the runtime's directory",
        )
    } else {
        Finding::ok("cni plugin", "not installed, and not asked for")
    }
}

/// Some runtimes bring up a pod's loopback interface by it, and start no pod without.
fn loopback(subject: &Subject) -> Finding {
    let path = subject.places.bin_dir.join(LOOPBACK);
    if path.is_file() {
        return Finding::ok("cni loopback", path.display().to_string());
    }
    if is_asked_for(subject) {
        Finding::warn(
            "cni loopback",
            format!("{} is missing: containerd starts no pod without it", path.display()),
            "ferroflow prepare --cni-bin-dir DIR puts one there; containerd with use_internal_loopback = true, and \
             CRI-O, need none",
        )
    } else {
        Finding::ok("cni loopback", "not installed, and not asked for")
    }
}

fn is_asked_for(subject: &Subject) -> bool {
    subject.places.configurations().is_ok_and(|found| found.iter().any(|it| it.ours))
}

/// What the agent writes: a file system that cannot be written, or that is full, takes parts of it away.
fn directories(subject: &Subject) -> [Finding; 3] {
    let Places { conf_dir, state_dir, run_dir, bin_dir: _ } = &subject.places;
    // The agent's socket for the plugin is there, too.
    let run = directory("run directory", run_dir, "--run-dir and --cni-socket");
    let of_plugin = |check, dir, flag| {
        let finding = directory(check, dir, flag);
        if finding.grade == Grade::Ok || is_asked_for(subject) {
            return finding;
        }
        Finding::ok(check, format!("{}; only an agent with --cni writes there", finding.found))
    };
    [
        run,
        of_plugin("state directory", state_dir, "--state-dir"),
        of_plugin("cni directory", conf_dir, "--cni-conf-dir"),
    ]
}

/// Looks at the nearest directory that exists, and makes nothing.
fn directory(check: &'static str, dir: &Path, flag: &str) -> Finding {
    let nearest = dir.ancestors().find(|dir| dir.exists()).unwrap_or(dir);
    let found = match statvfs(nearest) {
        Ok(found) => found,
        Err(errno) => {
            return Finding::fail(
                check,
                format!("{}: {errno}", dir.display()),
                format!("name another with {flag}"),
            );
        }
    };
    if found.flags().contains(FsFlags::ST_RDONLY) {
        return Finding::fail(
            check,
            format!("{} is on a file system that cannot be written", dir.display()),
            format!(
                "mount -o remount,rw the one of {}, and see in the kernel's log why it is not; or name another with {flag}",
                nearest.display()
            ),
        );
    }
    // Some file systems do not count files.
    let no_files = found.files() > 0 && found.files_available() == 0;
    if found.blocks_available() == 0 || no_files {
        let what = if no_files { "files" } else { "bytes" };
        return Finding::fail(
            check,
            format!("{} is on a file system that has no {what} left", dir.display()),
            format!("make room (df {0}; df -i {0}), or name another with {flag}", nearest.display()),
        );
    }
    Finding::ok(check, dir.display().to_string())
}

/// Two that translate the same Services: the rules of the other see packets that are translated already.
fn kube_proxy() -> Finding {
    const WAY_OUT: &str = "remove kube-proxy (kubectl -n kube-system delete daemonset kube-proxy; kubeadm: \
                           --skip-phases=addon/kube-proxy), then its rules (ferroflow cleanup, or a restart of the node)";
    let found = kube_proxy::look();
    match (found.process, found.rules.as_slice()) {
        (Some(pid), _) => Finding::fail("kube-proxy", format!("running (process {pid})"), WAY_OUT),
        (None, []) => Finding::ok("kube-proxy", "not running, and no rules of it"),
        (None, rules) => {
            Finding::warn("kube-proxy", format!("its rules are in {}", rules.join(", ")), WAY_OUT)
        }
    }
}

fn port(number: u16, state: Agent) -> Finding {
    let check = if number == PROXY_PORT { "port 10256" } else { "port 10249" };
    match (is_listened_to(number), state) {
        (false, _) => Finding::ok(check, "free"),
        (true, Agent::Runs) => Finding::ok(check, "in use; the agent runs"),
        (true, Agent::Rests) => Finding::fail(
            check,
            "in use, and no agent runs",
            format!("end what listens there (ss -ltnp sport = :{number}): kube-proxy uses the same port"),
        ),
    }
}

fn is_listened_to(port: u16) -> bool {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"];
    tables.iter().any(|path| fs::read_to_string(path).is_ok_and(|table| has_listener(&table, port)))
}

/// In the form of /proc/net/tcp: the local address in hexadecimal, state 0A is LISTEN (`include/net/tcp_states.h`).
fn has_listener(table: &str, port: u16) -> bool {
    let suffix = format!(":{port:04X}");
    table.lines().skip(1).any(|line| {
        let mut fields = line.split_whitespace().skip(1);
        fields.next().is_some_and(|local| local.ends_with(&suffix)) && fields.nth(1) == Some("0A")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Bpffs;

    fn subject(dir: &Path) -> Subject {
        let places = Places {
            conf_dir: dir.to_owned(),
            bin_dir: dir.join("bin"),
            state_dir: dir.join("state"),
            run_dir: dir.join("run"),
        };
        Subject { bpffs: Bpffs { dir: dir.join("bpffs") }, cgroup: None, places }
    }

    #[test]
    fn the_first_configuration_decides() {
        let dir = tempfile::tempdir().unwrap();
        let subject = subject(dir.path());
        assert_eq!(configurations(&subject).grade, Grade::Ok);
        fs::write(dir.path().join("05-ferroflow.conflist"), r#"{"plugins": [{"type": "ferroflow-cni"}]}"#)
            .unwrap();
        assert_eq!(configurations(&subject).grade, Grade::Ok);
        fs::write(dir.path().join("10-calico.conflist"), r#"{"plugins": [{"type": "calico"}]}"#).unwrap();
        assert_eq!(configurations(&subject).grade, Grade::Warn);
        fs::write(dir.path().join("00-bridge.conf"), r#"{"type": "bridge"}"#).unwrap();
        let finding = configurations(&subject);
        assert_eq!(finding.grade, Grade::Fail);
        assert!(finding.found.starts_with("00-bridge.conf comes first"), "{}", finding.found);
        fs::write(dir.path().join("README"), "").unwrap();
        assert_eq!(configurations(&subject), finding);
    }

    #[test]
    fn a_configuration_without_its_plugin_fails() {
        let dir = tempfile::tempdir().unwrap();
        let subject = subject(dir.path());
        assert_eq!(plugin(&subject).grade, Grade::Ok);
        fs::write(dir.path().join("05-ferroflow.conflist"), r#"{"plugins": [{"type": "ferroflow-cni"}]}"#)
            .unwrap();
        assert_eq!(plugin(&subject).grade, Grade::Fail);
        fs::create_dir(dir.path().join("bin")).unwrap();
        fs::write(dir.path().join("bin").join(PLUGIN), "").unwrap();
        assert_eq!(plugin(&subject).grade, Grade::Ok);
    }

    #[test]
    fn a_configuration_without_a_loopback_plugin_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let subject = subject(dir.path());
        assert_eq!(loopback(&subject).grade, Grade::Ok);
        fs::write(dir.path().join("05-ferroflow.conflist"), r#"{"plugins": [{"type": "ferroflow-cni"}]}"#)
            .unwrap();
        fs::create_dir(dir.path().join("bin")).unwrap();
        // A link to what is gone is as good as none.
        let path = dir.path().join("bin").join(LOOPBACK);
        std::os::unix::fs::symlink(PLUGIN, &path).unwrap();
        let finding = loopback(&subject);
        assert_eq!(finding.grade, Grade::Warn);
        assert!(finding.fix.unwrap().contains("prepare --cni-bin-dir"));
        fs::write(dir.path().join("bin").join(PLUGIN), "").unwrap();
        assert_eq!(loopback(&subject).grade, Grade::Ok);
    }

    #[test]
    fn a_directory_that_cannot_be_written_fails_where_it_is_needed() {
        let dir = tempfile::tempdir().unwrap();
        let mut subject = subject(dir.path());
        let grades = |subject: &Subject| directories(subject).map(|it| it.grade);
        assert_eq!(grades(&subject), [Grade::Ok; 3]);
        // Nobody writes there: it has neither blocks nor names.
        let proc = Path::new("/proc/self");
        (subject.places.state_dir, subject.places.run_dir) = (proc.join("state"), proc.join("run"));
        assert_eq!(grades(&subject), [Grade::Fail, Grade::Ok, Grade::Ok]);
        fs::write(dir.path().join("05-ferroflow.conflist"), r#"{"plugins": [{"type": "ferroflow-cni"}]}"#)
            .unwrap();
        assert_eq!(grades(&subject), [Grade::Fail, Grade::Fail, Grade::Ok]);
        let [run, ..] = directories(&subject);
        assert!(
            run.found.contains("no bytes left") && run.fix.unwrap().contains("--run-dir"),
            "{}",
            run.found
        );
    }

    #[test]
    fn a_listener_is_told_from_a_connection() {
        const TABLE: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid\n   \
            0: 00000000:2810 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0\n   \
            1: 0100007F:2809 0100007F:9C40 01 00000000:00000000 00:00000000 00000000     0\n";
        assert!(has_listener(TABLE, 10256));
        assert!(!has_listener(TABLE, 10249));
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(port(listener.local_addr().unwrap().port(), Agent::Rests).grade, Grade::Fail);
    }
}
