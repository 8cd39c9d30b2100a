//! Installs what building needs and this machine lacks: the pinned toolchain, and bpf-linker built against the LLVM
//! that this toolchain brings, so that no LLVM has to be installed.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, io};

use anyhow::{Context, Result, bail};

use crate::toolchain::{Toolchain, output, succeed};

/// Installs what is missing and returns the BPF linker's path.
pub(crate) fn run(toolchain: &Toolchain) -> Result<PathBuf> {
    let rust = format!("rust {} with {}", toolchain.channel(), toolchain.components().join(", "));
    let missing = toolchain.missing()?;
    if missing.is_empty() {
        eprintln!("present    {rust}");
    } else {
        eprintln!("missing    {}: installing", missing.join(", "));
        toolchain.install()?;
        eprintln!("installed  {rust}");
    }
    if !c_library("libc.a")?.is_absolute() {
        bail!("the static C library is missing; install libc6-dev (Debian, Ubuntu) or glibc-static (Fedora)");
    }
    let linker = Linker::of(toolchain)?;
    // One setup at a time: a second clone waits for the first one's linker instead of building it again.
    let lock = lock(&linker.home)?;
    if linker.works()? {
        eprintln!("present    bpf-linker {VERSION}");
    } else {
        eprintln!("missing    bpf-linker {VERSION}: building it, {BUILD_TIME}, once for this toolchain");
        linker.install(toolchain)?;
        eprintln!("installed  bpf-linker {VERSION} in {}", linker.home.display());
    }
    drop(lock);
    Ok(linker.binary())
}

/// bpf-linker for one toolchain: `bin/bpf-linker`, and `lib`, where it looks for the toolchain's LLVM.
struct Linker {
    home: PathBuf,
    llvm: Llvm,
}

impl Linker {
    fn of(toolchain: &Toolchain) -> Result<Self> {
        let home = cache()?.join(format!("bpf-linker-{VERSION}-rust-{}", toolchain.channel()));
        Ok(Self { home, llvm: Llvm::of(&toolchain.sysroot()?)? })
    }

    fn binary(&self) -> PathBuf {
        self.home.join("bin/bpf-linker")
    }

    /// Starts it. The toolchain may have moved since it was built, so its libraries are linked anew first.
    fn works(&self) -> Result<bool> {
        if !self.binary().exists() {
            return Ok(false);
        }
        self.llvm.link_into(&self.home.join("lib"))?;
        Ok(output(Command::new(self.binary()).arg("--version")).is_ok_and(|line| line.contains(VERSION)))
    }

    /// Builds beside the place and renames, so that an interrupted build leaves nothing that looks complete.
    fn install(&self, toolchain: &Toolchain) -> Result<()> {
        let building = beside(&self.home, "building");
        remove(&building)?;
        let lib = building.join("lib");
        self.llvm.link_into(&lib)?;
        link_cpp_runtime(&lib)?;
        let mut cargo = toolchain.cargo();
        cargo.args([
            "install",
            "bpf-linker",
            "--version",
            VERSION,
            "--locked",
            "--no-track",
            "--no-default-features",
        ]);
        cargo.args(["--features", &format!("llvm-{},no-llvm-linking", self.llvm.major)]);
        cargo.arg("--root").arg(&building);
        // Else cargo advises to add this passing folder to the PATH.
        let path = env::var_os("PATH").unwrap_or_default();
        cargo.env("PATH", env::join_paths(env::split_paths(&path).chain([building.join("bin")]))?);
        cargo.env("CARGO_TARGET_DIR", building.join("target"));
        cargo.env("CARGO_ENCODED_RUSTFLAGS", rustflags(&lib));
        // LLVM does the work and is optimised already: this halves the time of the build and costs none at linking.
        for (key, value) in [("LTO", "off"), ("OPT_LEVEL", "1"), ("CODEGEN_UNITS", "16"), ("DEBUG", "0")] {
            cargo.env(format!("CARGO_PROFILE_RELEASE_{key}"), value);
        }
        succeed(&mut cargo).context("building bpf-linker failed; it is downloaded with cargo, once")?;
        remove(&building.join("target"))?;
        remove(&self.home)?;
        fs::rename(&building, &self.home)
            .with_context(|| format!("cannot move the linker to {}", self.home.display()))?;
        if !self.works()? {
            bail!(
                "{} was built but does not start; run it with --version to see why",
                self.binary().display()
            );
        }
        Ok(())
    }
}

/// The run-time path is relative: the `lib` beside `bin` follows the toolchain.
fn rustflags(lib: &Path) -> String {
    let flags = [
        &format!("-Lnative={}", lib.display()),
        "-Clink-arg=-lLLVM",
        "-Clink-arg=-lstdc++",
        "-Clink-arg=-Wl,-rpath,$ORIGIN/../lib",
    ];
    flags.join("\x1f")
}

/// The toolchain's own LLVM.
struct Llvm {
    major: String,
    library: PathBuf,
}

impl Llvm {
    fn of(sysroot: &Path) -> Result<Self> {
        let lib = sysroot.join("lib");
        let entries = fs::read_dir(&lib).with_context(|| format!("cannot list {}", lib.display()))?;
        for entry in entries {
            let library = entry?.path();
            let name = library.file_name().unwrap_or_default().to_string_lossy();
            if let Some(version) = name.strip_prefix("libLLVM.so.") {
                let major = version.chars().take_while(char::is_ascii_digit).collect();
                return Ok(Self { major, library });
            }
        }
        bail!("{} holds no libLLVM.so.*: bpf-linker needs a toolchain installed by rustup", lib.display())
    }

    /// Under its own name, by which the linker loads it, and as `libLLVM.so`, by which `-lLLVM` finds it.
    fn link_into(&self, lib: &Path) -> Result<()> {
        fs::create_dir_all(lib).with_context(|| format!("cannot make {}", lib.display()))?;
        for name in [self.library.file_name().unwrap_or_default(), "libLLVM.so".as_ref()] {
            relink(&self.library, &lib.join(name))?;
        }
        Ok(())
    }
}

/// `-lstdc++` needs `libstdc++.so`, which comes with a C++ compiler; the run-time library, which comes with nearly
/// everything, serves as well.
fn link_cpp_runtime(lib: &Path) -> Result<()> {
    if c_library("libstdc++.so")?.is_absolute() {
        return Ok(());
    }
    let runtime = c_library("libstdc++.so.6")?;
    if !runtime.is_absolute() {
        bail!("libstdc++ is not installed; install the package libstdc++6 or a C++ compiler");
    }
    relink(&runtime, &lib.join("libstdc++.so"))
}

/// Where the C compiler finds a library; the bare name where it does not.
fn c_library(file: &str) -> Result<PathBuf> {
    let path = output(Command::new("cc").arg(format!("-print-file-name={file}")));
    Ok(path.context("there is no C compiler; install gcc or clang")?.trim().into())
}

fn relink(to: &Path, at: &Path) -> Result<()> {
    if fs::read_link(at).is_ok_and(|target| target == to) {
        return Ok(());
    }
    remove(at)?;
    symlink(to, at).with_context(|| format!("cannot link {} to {}", at.display(), to.display()))
}

pub(crate) fn remove(path: &Path) -> Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    };
    removed.with_context(|| format!("cannot remove {}", path.display()))
}

pub(crate) fn cache() -> Result<PathBuf> {
    let base = match env::var_os("XDG_CACHE_HOME").filter(|base| !base.is_empty()) {
        Some(base) => base.into(),
        None => PathBuf::from(env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?)
            .join(".cache"),
    };
    Ok(base.join("ferroflow"))
}

/// `<path>.<suffix>`; `with_extension` would cut the version short.
pub(crate) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(suffix);
    name.into()
}

pub(crate) fn lock(home: &Path) -> Result<File> {
    let path = beside(home, "lock");
    let cannot = || format!("cannot lock {}", path.display());
    fs::create_dir_all(home.parent().unwrap_or(home)).with_context(cannot)?;
    let file = File::create(&path).with_context(cannot)?;
    if file.try_lock().is_err() {
        eprintln!("waiting    another setup is running");
        file.lock().with_context(cannot)?;
    }
    Ok(file)
}

const VERSION: &str = "0.13.0";
const BUILD_TIME: &str = "about a minute";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llvm_is_found_and_linked_again_when_the_toolchain_moves() {
        let base = env::temp_dir().join(format!("xtask-setup-{}", std::process::id()));
        let lib = base.join("linker/lib");
        for sysroot in ["old", "new"] {
            let sysroot = base.join(sysroot);
            fs::create_dir_all(sysroot.join("lib")).unwrap();
            let library = sysroot.join("lib/libLLVM.so.22.1-rust-1.98.0-stable");
            fs::write(&library, "").unwrap();
            let llvm = Llvm::of(&sysroot).unwrap();
            assert_eq!(llvm.major, "22");
            llvm.link_into(&lib).unwrap();
            assert_eq!(fs::read_link(lib.join("libLLVM.so")).unwrap(), library);
        }
        fs::remove_dir_all(base).unwrap();
    }
}
