//! The kernel, its BPF, and the file systems that come with both.

use std::fs;
use std::path::Path;

use aya::maps::MapType;
use aya::programs::ProgramType;
use aya::sys::{is_map_supported, is_program_supported};
use nix::sys::statfs::{BPF_FS_MAGIC, CGROUP2_SUPER_MAGIC, statfs};
use nix::sys::statvfs::{FsFlags, statvfs};

use super::{Finding, Subject};
use crate::datapath::{Causes, cgroup2_mount, kernel_is_at_least};
use crate::net::device::has_netkit;

pub(super) fn findings(subject: &Subject) -> Vec<Finding> {
    let mut findings = vec![version(), bpf(), jit(), btf(), tcx(), pod_devices(), bpffs(&subject.bpffs.dir)];
    findings.push(cgroup(subject.cgroup.as_deref()));
    findings
}

fn version() -> Finding {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    if kernel_is_at_least(5, 10) {
        Finding::ok("kernel", release)
    } else {
        Finding::fail("kernel", release, "the programs need Linux 5.10 or newer: update the node's kernel")
    }
}

/// The kinds of programs and maps that cannot be done without; asking creates one of each and drops it.
fn bpf() -> Finding {
    const WAY_OUT: &str = "run as root with the capabilities BPF, NET_ADMIN, PERFMON and SYS_ADMIN on a kernel with \
                           CONFIG_BPF_SYSCALL, CONFIG_NET_CLS_BPF and CONFIG_CGROUP_BPF";
    let programs = [
        ("TC programs", ProgramType::SchedClassifier),
        ("socket programs", ProgramType::CgroupSockAddr),
        ("XDP programs", ProgramType::Xdp),
    ];
    let maps = [("LRU hash maps", MapType::LruHash), ("prefix maps", MapType::LpmTrie)];
    let programs =
        programs.map(|(name, kind)| (name, is_program_supported(kind).map_err(|it| Causes(&it).to_string())));
    let maps = maps.map(|(name, kind)| (name, is_map_supported(kind).map_err(|it| Causes(&it).to_string())));
    let missing: Vec<_> = programs
        .into_iter()
        .chain(maps)
        .filter_map(|(name, answer)| match answer {
            Ok(true) => None,
            Ok(false) => Some(format!("no {name}")),
            Err(error) => Some(format!("{name}: {error}")),
        })
        .collect();
    if missing.is_empty() {
        Finding::ok("bpf", "TC, socket and XDP programs, LRU and prefix maps")
    } else {
        Finding::fail("bpf", missing.join("; "), WAY_OUT)
    }
}

fn jit() -> Finding {
    let path = "/proc/sys/net/core/bpf_jit_enable";
    match fs::read_to_string(path).as_deref().map(str::trim) {
        Ok("0") => Finding::warn(
            "bpf jit",
            "programs are interpreted, several times slower",
            "sysctl -w net.core.bpf_jit_enable=1",
        ),
        Ok(_) => Finding::ok("bpf jit", "programs are compiled"),
        // Where the kernel always compiles, there is no switch in other network namespaces than the first.
        Err(_) => Finding::ok("bpf jit", "no switch in this network namespace"),
    }
}

fn btf() -> Finding {
    let path = "/sys/kernel/btf/vmlinux";
    if Path::new(path).exists() {
        Finding::ok("btf", path)
    } else {
        Finding::warn(
            "btf",
            format!("{path} is missing"),
            "the agent works without; bpftool shows maps without field names. A kernel with CONFIG_DEBUG_INFO_BTF has it",
        )
    }
}

fn tcx() -> Finding {
    if kernel_is_at_least(6, 6) {
        Finding::ok("attachment", "tcx")
    } else {
        Finding::ok("attachment", "clsact filters (tcx came with Linux 6.6)")
    }
}

fn pod_devices() -> Finding {
    match has_netkit() {
        Ok(true) => Finding::ok("pod devices", "veth, netkit"),
        Ok(false) => Finding::ok("pod devices", "veth (netkit takes Linux 6.7 with CONFIG_NETKIT)"),
        Err(error) => Finding::warn("pod devices", error.to_string(), "run as root; veth does without"),
    }
}

fn bpffs(dir: &Path) -> Finding {
    let kind = |dir: &Path| statfs(dir).map(|found| found.filesystem_type());
    let nearest = dir.ancestors().find_map(|dir| kind(dir).ok());
    if nearest == Some(BPF_FS_MAGIC) {
        let flags = dir.ancestors().find_map(|dir| statvfs(dir).ok()).map(|found| found.flags());
        if flags.is_some_and(|flags| flags.contains(FsFlags::ST_RDONLY)) {
            return Finding::fail(
                "bpffs",
                format!("{} cannot be written", dir.display()),
                "mount -o remount,rw the BPF file system, or name a directory of another with --bpffs",
            );
        }
        return Finding::ok("bpffs", dir.display().to_string());
    }
    let fix = if dir.starts_with("/sys/fs/bpf") {
        "mount -t bpf bpf /sys/fs/bpf (an agent outside of a container does it by itself; the chart does with \
         host.mountBpffs)"
            .to_owned()
    } else {
        format!("mount -t bpf bpf {0}, or name another directory with --bpffs", dir.display())
    };
    Finding::fail("bpffs", format!("{} is not on a BPF file system", dir.display()), fix)
}

fn cgroup(named: Option<&Path>) -> Finding {
    const WAY_OUT: &str = "mount cgroup2 (systemd.unified_cgroup_hierarchy=1, or mount -t cgroup2 none DIR) and name \
                           its root with --cgroup (chart: host.cgroup)";
    let Some(dir) = named else {
        return match cgroup2_mount() {
            Ok(dir) => Finding::ok("cgroup2", dir.display().to_string()),
            Err(error) => Finding::fail("cgroup2", error.to_string(), WAY_OUT),
        };
    };
    match statfs(dir).map(|found| found.filesystem_type()) {
        Ok(CGROUP2_SUPER_MAGIC) => Finding::ok("cgroup2", dir.display().to_string()),
        Ok(_) => Finding::fail("cgroup2", format!("{} is not cgroup2", dir.display()), WAY_OUT),
        Err(errno) => Finding::fail("cgroup2", format!("{}: {errno}", dir.display()), WAY_OUT),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Grade;
    use super::*;

    #[test]
    fn a_directory_that_is_no_bpf_file_system_fails_with_the_mount_to_make() {
        let dir = tempfile::tempdir().unwrap();
        let finding = bpffs(dir.path());
        assert_eq!(finding.grade, Grade::Fail);
        assert!(finding.fix.unwrap().starts_with(&format!("mount -t bpf bpf {}", dir.path().display())));
    }

    #[test]
    fn a_directory_that_is_no_cgroup2_fails() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(cgroup(Some(dir.path())).grade, Grade::Fail);
        assert_eq!(cgroup(Some(&dir.path().join("nothing"))).grade, Grade::Fail);
    }
}
