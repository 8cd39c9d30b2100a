//! Checks the architecture in the text of the sources: who may import whom, how files are named, where `unsafe` may
//! stand. The tables come first; what reads them is below.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::paths::{blank, module, paths, tokens};

/// What the modules `of` must never import. A name is the beginning of a path, or after `*::` its end.
struct Imports {
    of: &'static [&'static str],
    except: &'static [&'static str],
    never: &'static [&'static str],
    why: &'static str,
    instead: &'static str,
}

#[rustfmt::skip]
const IMPORTS: &[Imports] = &[
    Imports { of: &["agent/src/model"], except: &[],
        never: &["kube", "k8s_openapi", "hyper", "aya", "tokio", "*::Instant::now"],
        why: "the model is plain types", instead: "decode in watch, and take the time as an argument" },
    Imports { of: &["agent/src/watch"], except: &[],
        never: &["crate::plan", "crate::maps"],
        why: "sources only say what the cluster is", instead: "change the model; the reconciler sees it" },
    Imports { of: &["agent/src"], except: &["agent/src/watch"],
        never: &["kube"],
        why: "only the source talks to the Kubernetes API", instead: "ask in watch/kube; note events with a Recorder" },
    Imports { of: &["agent/src"],
        except: &["agent/src/daemon", "agent/src/health/server", "agent/src/watch/kube/events", "agent/src/watch/kube/ready"],
        never: &["*::SystemTime::now", "*::Timestamp::now", "*::ClockId::CLOCK_REALTIME"],
        why: "the wall clock may be set at any moment: it is for showing times", instead: "take an Instant, or crate::clock" },
    Imports { of: &["agent/src/plan"], except: &[],
        never: &["aya", "kube", "k8s_openapi", "hyper", "tokio", "nix", "libc", "rtnetlink", "rand", "getrandom",
            "std::fs", "std::io", "std::env", "std::process", "std::thread", "std::net::TcpStream",
            "std::net::TcpListener", "std::net::UdpSocket", "*::Instant::now",
            "crate::watch", "crate::reconcile", "crate::maps", "crate::datapath", "crate::net", "crate::observe"],
        why: "a plan is a pure function", instead: "take what it needs as an argument, return rows" },
    Imports { of: &["agent/src/reconcile"], except: &[],
        never: &["crate::watch", "kube", "k8s_openapi", "aya"],
        why: "the reconciler knows plans and tables only", instead: "go through plan, or the trait in maps" },
    Imports { of: &["agent/src/maps"], except: &[],
        never: &["crate::model", "crate::plan"],
        why: "tables hold what common::abi lays out", instead: "convert to rows in plan" },
    Imports { of: &["agent/src/maps"], except: &["agent/src/maps/kernel", "agent/src/maps/transfer"],
        never: &["aya"],
        why: "only the kernel's tables are aya's", instead: "move it to maps/kernel.rs" },
    Imports { of: &["agent/src/health"], except: &[],
        never: &["crate::maps", "crate::reconcile", "crate::watch", "crate::datapath", "aya", "k8s_openapi"],
        why: "health is told, it does not look", instead: "pass the value it needs" },
    Imports { of: &["agent/src/datapath"], except: &[],
        never: &["crate::model"],
        why: "programs are attached without knowing the cluster", instead: "pass the value it needs" },
    Imports { of: &["agent/src/node"], except: &[],
        never: &["crate::maps", "crate::model", "crate::plan", "crate::reconcile", "crate::watch", "k8s_openapi"],
        why: "the machine is looked at without the cluster", instead: "take what it needs from config or datapath" },
    Imports { of: &["agent/src/cni", "agent/src/ipam", "agent/src/net"], except: &[],
        never: &["crate::maps", "aya"],
        why: "pods are plumbed without touching tables", instead: "report the endpoint; the plan makes its rows" },
    Imports { of: &["agent/src/observe", "agent/src/cli"], except: &[],
        never: &["crate::reconcile", "crate::datapath", "crate::net", "crate::ipam", "*::Writer"],
        why: "showing never writes", instead: "read the model or the tables" },
    Imports { of: &["ebpf/src"], except: &["ebpf/src/object"],
        never: &["aya_ebpf", "aya_log_ebpf"],
        why: "the logic is tested on the host", instead: "use the Packet and Tables traits; object/ implements them" },
    Imports { of: &["common/src"], except: &[],
        never: &["aya", "aya_ebpf", "aya_obj"],
        why: "both sides share it", instead: "wrap the type on the side that needs it" },
];

/// The only places for `unsafe`.
const UNSAFE: &[&str] = &[
    // bpf(2) for a kind of link that aya does not make.
    "agent/src/datapath/netkit",
    "agent/src/heap",
    "agent/src/maps/batch",
    "agent/src/maps/kernel",
    "agent/src/maps/transfer",
    "ebpf/src/object",
];

/// Names that say nothing.
const NAMES: &[&str] = &["common", "helper", "helpers", "manager", "misc", "util", "utils"];

const CRATES: &[&str] = &["agent", "bpf-tests", "common", "ebpf", "xtask"];

/// More lines than this, tests left out, are mentioned.
const LONG: usize = 400;

struct Source {
    path: String,
    text: String,
}

pub(crate) fn run(root: &Path) -> Result<()> {
    let mut sources = Vec::new();
    for name in CRATES {
        collect(root, &root.join(name), &mut sources)?;
    }
    sources.sort_by(|a, b| a.path.cmp(&b.path));
    for source in &sources {
        let lines = production(&source.text).lines().count();
        if lines > LONG {
            println!("{}: {lines} lines; a reader would like it split by noun", source.path);
        }
    }
    let violations = violations(&sources);
    violations.iter().for_each(|violation| eprintln!("{violation}"));
    if !violations.is_empty() {
        bail!("{} violations; the rules are the tables at the top of xtask/src/layers.rs", violations.len());
    }
    println!("{} files keep to the layers", sources.len());
    Ok(())
}

fn collect(root: &Path, folder: &Path, sources: &mut Vec<Source>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            collect(root, &path, sources)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text =
                fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            let path = path.strip_prefix(root)?.to_string_lossy().into_owned();
            sources.push(Source { path, text });
        }
    }
    Ok(())
}

/// Each as `file:line: rule: why; way out`.
fn violations(sources: &[Source]) -> Vec<String> {
    let mut found = Vec::new();
    for source in sources {
        let code = blank(&source.text);
        let mut report = |line: usize, what: String| found.push(format!("{}:{line}: {what}", source.path));
        let folder = format!("{}/", source.path.trim_end_matches(".rs"));
        if sources.iter().any(|other| other.path.starts_with(&folder)) {
            report(
                1,
                format!("module beside its folder: it hides in the list of files; move it to {folder}mod.rs"),
            );
        }
        let words: Vec<&str> = source.path.split(['/', '.']).skip(1).collect();
        if let Some(name) = words.iter().find(|word| NAMES.contains(word)) {
            report(1, format!("name `{name}`: says nothing; name it after the type or noun it holds"));
        }
        let tokens = tokens(&code);
        for pair in tokens.windows(2) {
            if pair[0].1 == "mod" && NAMES.contains(&pair[1].1) {
                report(pair[0].0, format!("name `{}`: says nothing; name it after what it holds", pair[1].1));
            }
        }
        for (line, _) in tokens.iter().filter(|(_, word)| *word == "unsafe" && !inside(&source.path, UNSAFE))
        {
            report(*line, format!("unsafe: may stand only in {}; move it there", UNSAFE.join(" and ")));
        }
        for (line, path) in paths(&crate::paths::tokens(production(&code)), &module(&source.path)) {
            for rule in broken(&source.path, &path) {
                report(line, format!("import of {path}: {}; {}", rule.why, rule.instead));
            }
        }
    }
    found
}

fn broken<'a>(file: &'a str, path: &'a str) -> impl Iterator<Item = &'static Imports> + 'a {
    let never = move |name: &&str| match name.strip_prefix("*::") {
        Some(end) => path.strip_suffix(end).is_some_and(|rest| rest.is_empty() || rest.ends_with("::")),
        None => path.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with("::")),
    };
    let applies = move |rule: &&Imports| inside(file, rule.of) && !inside(file, rule.except);
    IMPORTS.iter().filter(applies).filter(move |rule| rule.never.iter().any(never))
}

fn inside(file: &str, places: &[&str]) -> bool {
    let within =
        |place: &&str| file.strip_prefix(*place).is_some_and(|rest| rest == ".rs" || rest.starts_with('/'));
    places.iter().any(within)
}

/// What precedes the tests, which stand at the bottom and may import what they like.
fn production(text: &str) -> &str {
    text.find("\n#[cfg(test)]\nmod tests").map_or(text, |end| &text[..=end])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str, text: &str) -> Vec<String> {
        violations(&[Source { path: path.to_owned(), text: text.to_owned() }])
    }

    #[test]
    fn every_forbidden_import_is_found() {
        for rule in IMPORTS {
            for (place, name) in
                rule.of.iter().flat_map(|place| rule.never.iter().map(move |name| (place, name)))
            {
                let path = format!("{place}/new.rs");
                let import = format!("\nuse {};\n", name.replace('*', "std::time"));
                let found = found(&path, &import);
                assert!(
                    found.iter().any(|line| line.starts_with(&format!("{path}:2: import of "))),
                    "{name}"
                );
                assert!(
                    found.iter().any(|line| line.ends_with(&format!(": {}; {}", rule.why, rule.instead)))
                );
            }
        }
    }

    #[test]
    fn imports_are_found_however_they_are_written() {
        for text in [
            "use std::{fmt, time::Duration}; use {crate::{net, maps::{self, Maps as M}}, std::io::Write};",
            "fn f() -> crate::maps::Table { todo() }",
            "pub(crate) use super::maps::*;",
            "use self::super::maps;",
            "let s = '\"'; use crate::maps; let t = '\"';",
            "let s = \"\\\"\"; use crate::maps; /* a */",
            "let s = r#\"\"\"#; use crate::maps; fn f<'a>(x: &'a str) {}",
        ] {
            assert!(!found("agent/src/watch/mod.rs", text).is_empty(), "{text}");
        }
        assert_eq!(found("agent/src/watch/kube/list.rs", "use super::super::super::plan::Row;").len(), 1);
        assert_eq!(found("agent/src/plan/ids.rs", "fn f() { Instant::now(); SystemTime::now() }").len(), 2);
    }

    #[test]
    fn what_only_looks_forbidden_passes() {
        for (path, text) in [
            (
                "agent/src/plan/mod.rs",
                "//! use aya;\n/* crate::maps::X */ const A: &str = \"crate::maps::X unsafe\";",
            ),
            ("agent/src/plan/mod.rs", "use crate::planner::X; use std::net::IpAddr; use crate::mapsize::Y;"),
            (
                "agent/src/plan/mod.rs",
                "const A: &str = r#\"use aya::\"X;\"#; const B: &[u8] = br\"crate::maps::X\";",
            ),
            ("agent/src/watch/mod.rs", "use super::mapsize; use self::plan::Inner; use crate::model::plan;"),
            (
                "agent/src/reconcile/mod.rs",
                "fn a() {}\n#[cfg(test)]\nmod tests {\n    use crate::watch::X;\n}",
            ),
            ("agent/src/maps/kernel.rs", "use aya::maps::HashMap; unsafe impl Pod for Raw {}"),
            ("ebpf/src/object/tc.rs", "use aya_ebpf::programs::TcContext; fn f() { unsafe { g() } }"),
            ("ebpf/src/lib.rs", "#![forbid(unsafe_code)]\nfn f<'a>() -> impl Sized + use<'a> {}"),
            ("common/src/lib.rs", "mod addr;"),
        ] {
            assert_eq!(found(path, text), Vec::<String>::new());
        }
    }

    #[test]
    fn names_that_say_nothing_are_found() {
        for path in
            ["agent/src/utils.rs", "ebpf/src/common.rs", "agent/src/net/helpers/mod.rs", "xtask/src/misc.rs"]
        {
            assert!(found(path, "")[0].starts_with(&format!("{path}:1: name `")), "{path}");
        }
        assert_eq!(found("agent/src/net/mod.rs", "\nmod manager {}").len(), 1);
    }

    #[test]
    fn a_module_beside_its_folder_is_found() {
        let source = |path: &str| Source { path: path.to_owned(), text: String::new() };
        let found = violations(&[source("agent/src/plan.rs"), source("agent/src/plan/ids.rs")]);
        assert_eq!(found.len(), 1);
        assert!(found[0].ends_with("move it to agent/src/plan/mod.rs"));
    }

    #[test]
    fn unsafe_is_found_outside_its_places_also_in_tests() {
        for path in
            ["agent/src/datapath/attach.rs", "common/src/lib.rs", "ebpf/src/lb.rs", "agent/src/maps/mod.rs"]
        {
            let text = "fn f() {}\n#[cfg(test)]\nmod tests {\n    fn g() { unsafe { h() } }\n}";
            assert!(found(path, text)[0].starts_with(&format!("{path}:4: unsafe: ")), "{path}");
        }
    }
}
