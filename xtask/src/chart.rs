//! Checks and packs the Helm chart with Helm's own engine, which PyPI has as a library: no `helm` has to be installed.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::compile::{self, Profile};
use crate::setup::{self, beside};
use crate::test::Tally;
use crate::toolchain::{Toolchain, output, succeed};

pub(crate) fn run(toolchain: &Toolchain) -> Result<()> {
    let python = helm()?;
    let built = compile::run(toolchain, Profile::Dev)?;
    succeed(built.cargo(toolchain, "build")?.args(["--bin", "chart"])).context("the check does not build")?;
    let out = toolchain.target("chart");
    fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
    let mut check = Command::new(built.program("chart"));
    check.arg(out).current_dir(toolchain.root()).envs(built.env()).env("HELM_PYTHON", python);
    succeed(&mut check)
}

/// For CI.
pub(crate) fn part(toolchain: &Toolchain) -> Result<Tally> {
    run(toolchain)?;
    Ok(Tally::default())
}

/// A Python that has Helm, made once and shared by all clones.
fn helm() -> Result<PathBuf> {
    let home = setup::cache()?.join(format!("helm-python-sdk-{VERSION}"));
    let lock = setup::lock(&home)?;
    let python = home.join("bin/python");
    if output(Command::new(&python).args(["-c", "import helm_python"])).is_err() {
        eprintln!("missing    helm-python-sdk {VERSION}: installing");
        install(&home)?;
        eprintln!("installed  helm-python-sdk {VERSION} in {}", home.display());
    }
    drop(lock);
    Ok(python)
}

/// A virtual environment names its own path, so it is made in place; one that is half made does not import.
fn install(home: &std::path::Path) -> Result<()> {
    setup::remove(home)?;
    let venv = output(Command::new("python3").args(["-m", "venv"]).arg(home));
    venv.context("Python with venv is needed; install python3-venv (Debian, Ubuntu) or python3 (Fedora)")?;
    let pins = beside(home, "txt");
    fs::write(&pins, format!("helm-python-sdk=={VERSION}{HASHES}\n"))?;
    let mut pip = Command::new(home.join("bin/pip"));
    pip.args([
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--only-binary",
        ":all:",
        "--require-hashes",
    ]);
    let installed = output(pip.arg("--requirement").arg(&pins)).map(drop);
    fs::remove_file(&pins)?;
    installed.context("installing helm-python-sdk failed; pip downloads it, once")
}

const VERSION: &str = "0.2.2";

/// Of the wheel for x86-64, the only one for Linux.
const HASHES: &str = " --hash=sha256:28cc13abaf134c3a7e37f070c939be8d9cdc9825c3c8b8b2d35161073bcd4578";
