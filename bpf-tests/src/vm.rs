//! The first process of a virtual machine that tests another kernel: what `cargo xtask vm` boots.
//!
//! The initramfs holds, below `/vm`: `modules`, the paths of kernel modules in the order to load them; `commands`, one a
//! line; `bin`, the programs that they name; and `verified.json`, which is written to the second serial port at the end,
//! as the commands have left it. On the console each command ends with a line `vm: NAME ended with CODE`; the last line
//! is `vm: done`.

use std::{
    fs,
    fs::File,
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::{
    kmod::{ModuleInitFlags, finit_module},
    mount::{MsFlags, mount},
    sys::{
        reboot::{RebootMode, reboot},
        resource::{RLIM_INFINITY, Resource, setrlimit},
    },
    unistd::sync,
};

use crate::netns::Inside;

const ROOT: &str = "/vm";
const SECOND_PORT: &str = "/dev/ttyS1";
/// As many as a service manager gives a daemon.
const FILES: u64 = 65_536;

/// Runs the commands and ends the machine, whatever happens.
pub fn main() -> ! {
    match run() {
        Ok(()) => println!("vm: done"),
        Err(error) => println!("vm: {error:#}"),
    }
    sync();
    // What was printed leaves a serial port by and by.
    thread::sleep(Duration::from_millis(500));
    // QEMU ends where a machine restarts. It fails only for a process that is not the first of a machine.
    let refused = reboot(RebootMode::RB_AUTOBOOT);
    panic!("cannot restart: {refused:?}");
}

fn run() -> Result<()> {
    mount_all()?;
    load_modules()?;
    setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY).context("lift the memlock limit")?;
    setrlimit(Resource::RLIMIT_NOFILE, FILES, FILES).context("raise the limit of open files")?;
    // Programs that are run on one packet run there, and may send it round again.
    Inside::here()?.up("lo")?;
    let root = Path::new(ROOT);
    for line in lines(&root.join("commands"))? {
        let mut words = line.split(' ');
        let name = words.next().unwrap_or_default();
        let mut command = Command::new(root.join("bin").join(name));
        command.args(words).current_dir(root).stdin(Stdio::null());
        command
            .envs([("FERROFLOW_BIN", root.join("bin/ferroflow")), ("FERROFLOW_OBJECT", root.join("object"))]);
        let ended = command.status().with_context(|| format!("start {name}"))?;
        println!("vm: {name} ended with {}", ended.code().unwrap_or(-1));
    }
    let table = fs::read(root.join("verified.json")).context("read the table")?;
    let mut port = File::options().write(true).open(SECOND_PORT).context("open the second serial port")?;
    port.write_all(&table).and_then(|()| port.flush()).context("write the table")
}

fn mount_all() -> Result<()> {
    for (kind, target) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("tmpfs", "/tmp"),
        ("bpf", "/sys/fs/bpf"),
        ("cgroup2", "/sys/fs/cgroup"),
    ] {
        fs::create_dir_all(target).with_context(|| format!("create {target}"))?;
        let none: Option<&str> = None;
        mount(Some(kind), target, Some(kind), MsFlags::empty(), none)
            .with_context(|| format!("mount {kind} on {target}"))?;
    }
    Ok(())
}

fn load_modules() -> Result<()> {
    for path in lines(&Path::new(ROOT).join("modules"))? {
        let module = File::open(&path).with_context(|| format!("open {path}"))?;
        finit_module(&module, c"", ModuleInitFlags::empty()).with_context(|| format!("load {path}"))?;
    }
    Ok(())
}

fn lines(path: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    Ok(text.lines().map(str::to_owned).collect())
}
