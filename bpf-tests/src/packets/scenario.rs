//! Scenario files: objects, what the tables must hold, packets, and what must become of them, as text.
//!
//! ```text
//! # What it shows. Lines like this one are comments.
//! apply:
//!   apiVersion: v1
//!   kind: Service
//!   ...
//! tables:
//!   10.96.0.10:80/TCP -> default/web:http 10.244.1.2:8080
//! 1: send tcp 10.244.1.3:4000 > 10.96.0.10:80 SYN
//!   -> pod tcp 10.244.1.3:4000 > 10.244.1.2:8080 SYN
//! 2: answer 1 tcp SYN,ACK
//! 3: error 1 receiver 3/3 quoting 28
//! wait 40
//! remove Service default/web
//! 4: send udp 10.244.1.3:4000 > 10.96.0.10:53 by pod 10.244.1.2
//! 5: send udp 10.244.1.3:4000 > 10.96.0.10:53 in fragments of 64
//!   -> dropped fragment-of-service
//! ```
//! Each begins with the objects of [`super::random::ground`]: the node `here` (192.168.5.1, fd00:5::1, and 192.168.6.1,
//! fd00:6::1 without NodePorts) with the pods p0 to p2 (10.244.1.2 to .4, fd00:244:1::2 to ::4), and a node `there`.
//! `tables:` says what the tables hold beside what they hold then. `apply:` takes YAML documents; `->` lines are alternatives, in which a
//! port may be `*`, and `dropped` alone is for whichever reason. Without them the oracle
//! alone judges, which it does anyway. A packet comes from where its source address is, unless it says by which pod it is sent. A line `masquerading:` asks for a
//! node of [`Configuration::Masquerading`].

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::{fmt, fs};

use anyhow::{Context as _, Error, Result, bail, ensure};
use serde_json::{Value, json};

use super::case::{By, Says, Send, Step, What};
use super::cluster::Configuration;
use super::oracle::{Seen, To};
use super::text;
use super::wire::Packet;

/// A file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scenario {
    /// The comment at its beginning.
    pub title: String,
    pub configuration: Configuration,
    pub steps: Vec<Step>,
    /// What the tables hold after the steps before it.
    pub tables: Vec<(usize, Vec<String>)>,
}

impl FromStr for Scenario {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut scenario = Self::default();
        let mut lines = text.lines().enumerate().peekable();
        while let Some((number, line)) = lines.next() {
            if line.trim().is_empty() || line.starts_with('#') {
                if scenario.steps.is_empty() && line.starts_with('#') {
                    scenario.title += &format!("{line}\n");
                }
                continue;
            }
            let mut block = Vec::new();
            while let Some((_, inner)) = lines.next_if(|(_, it)| it.starts_with(' ') || it.trim().is_empty())
            {
                block.push(inner);
            }
            scenario.take(line, &block).with_context(|| format!("line {}", number + 1))?;
        }
        ensure!(!scenario.steps.is_empty(), "nothing happens in it");
        Ok(scenario)
    }
}

impl Scenario {
    fn take(&mut self, line: &str, block: &[&str]) -> Result<()> {
        match line {
            MASQUERADING => self.configuration = Configuration::Masquerading,
            "apply:" => {
                let text = block.join("\n");
                for document in text.split("\n  ---") {
                    let object: Value = serde_saphyr::from_str(document).context("a document of `apply`")?;
                    self.steps.push(Step::Apply(object));
                }
            }
            "tables:" => {
                let lines = block.iter().map(|line| line.trim().to_owned());
                self.tables.push((self.steps.len(), lines.filter(|line| !line.is_empty()).collect()));
            }
            line => {
                let mut step: Step = line.parse()?;
                let expected = block.iter().map(|line| line.trim()).filter(|line| !line.is_empty());
                for line in expected {
                    let line = line.strip_prefix("-> ").with_context(|| format!("no such line: {line}"))?;
                    let Step::Send(send) = &mut step else { bail!("only of a packet something becomes") };
                    send.becomes.push(line.to_owned());
                }
                self.steps.push(step);
            }
        }
        Ok(())
    }
}

impl FromStr for Step {
    type Err = Error;

    fn from_str(line: &str) -> Result<Self> {
        let (verb, rest) = line.split_once(' ').with_context(|| format!("no such step: {line}"))?;
        match verb {
            "wait" => Ok(Self::Wait(rest.parse().context("seconds")?)),
            "remove" => {
                let (kind, name) = rest.split_once(' ').context("kind and name are missing")?;
                let (namespace, name) = name.split_once('/').unwrap_or(("default", name));
                let metadata = json!({"namespace": namespace, "name": name});
                Ok(Self::Apply(json!({"kind": kind, "metadata": metadata, "gone": true})))
            }
            "apply:" => Ok(Self::Apply(serde_json::from_str(rest).context("an object on one line is JSON")?)),
            number => {
                let number = number.strip_suffix(':').with_context(|| format!("no such step: {line}"))?;
                let number = number.parse().with_context(|| format!("no such step: {line}"))?;
                Ok(Self::Send(Send { number, what: rest.parse()?, becomes: Vec::new() }))
            }
        }
    }
}

impl FromStr for What {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (verb, rest) = text.split_once(' ').with_context(|| format!("nothing is sent by `{text}`"))?;
        let words: Vec<_> = rest.split_whitespace().collect();
        match (verb, words.as_slice()) {
            ("send", _) => {
                let (rest, by) = match rest.split_once(" by pod ") {
                    Some((rest, pod)) => (rest, Some(pod.parse().context("the address of a pod")?)),
                    None => (rest, None),
                };
                let (packet, size) = match rest.split_once(" in fragments of ") {
                    Some((packet, size)) => (packet, Some(size.parse::<usize>()?)),
                    None => (rest, None),
                };
                let whole = |size: &usize| size.is_multiple_of(8) && *size > 0;
                ensure!(size.iter().all(whole), "fragments are multiples of eight bytes");
                Ok(Self::Packet { packet: packet.parse::<Packet>()?, fragments: size, by })
            }
            ("answer", [to, "udp"]) => Ok(Self::Answer { to: to.parse()?, says: Says::Udp }),
            ("answer", [to, "tcp", flags]) => {
                Ok(Self::Answer { to: to.parse()?, says: Says::Tcp(text::flags(flags)?) })
            }
            ("answer", [to, "sctp", chunk]) => {
                Ok(Self::Answer { to: to.parse()?, says: Says::Sctp(text::chunk(chunk)?) })
            }
            ("answer", [to, "echo"]) => Ok(Self::Answer { to: to.parse()?, says: Says::Echo }),
            ("error", [about, by, kind, "quoting", quoted]) => {
                let by = match *by {
                    "receiver" => By::Receiver,
                    "router" => By::Router,
                    other => bail!("no such sender of errors: {other}"),
                };
                let (kind, code) = kind.split_once('/').context("type/code is missing")?;
                let (kind, quoted) = ((kind.parse()?, code.parse()?), quoted.parse()?);
                Ok(Self::Error { about: about.parse()?, by, kind, quoted })
            }
            _ => bail!("nothing is sent by `{text}`"),
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Apply(object) if object["gone"] == true => {
                let text = |value: &Value| value.as_str().unwrap_or("default").to_owned();
                let metadata = &object["metadata"];
                let (namespace, name) = (text(&metadata["namespace"]), text(&metadata["name"]));
                write!(f, "remove {} {namespace}/{name}", text(&object["kind"]))
            }
            Self::Apply(object) => write!(f, "apply: {object}"),
            Self::Wait(seconds) => write!(f, "wait {seconds}"),
            Self::Send(Send { number, what, .. }) => write!(f, "{number}: {what}"),
        }
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Packet { packet, fragments, by } => {
                write!(f, "send {packet}")?;
                fragments.map_or(Ok(()), |size| write!(f, " in fragments of {size}"))?;
                by.map_or(Ok(()), |pod| write!(f, " by pod {pod}"))
            }
            Self::Answer { to, says: Says::Udp } => write!(f, "answer {to} udp"),
            Self::Answer { to, says: Says::Echo } => write!(f, "answer {to} echo"),
            Self::Answer { to, says: Says::Tcp(flags) } => {
                write!(f, "answer {to} tcp {}", text::flag_names(*flags))
            }
            Self::Answer { to, says: Says::Sctp(chunk) } => {
                write!(f, "answer {to} sctp {}", text::chunk_name(*chunk))
            }
            Self::Error { about, by, kind: (kind, code), quoted } => {
                let by = match by {
                    By::Receiver => "receiver",
                    By::Router => "router",
                };
                write!(f, "error {about} {by} {kind}/{code} quoting {quoted}")
            }
        }
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Went(to, packet) => {
                let to = match to {
                    To::Pod(_) => "pod",
                    To::Wire => "wire",
                    To::Host => "host",
                    To::Sender => "sender",
                };
                write!(f, "{to} {packet}")
            }
            Self::Dropped(Some(reason)) => write!(f, "dropped {reason}"),
            Self::Dropped(None) => f.write_str("dropped"),
        }
    }
}

/// The files of a folder, in the order of their names.
///
/// # Errors
/// Where it cannot be listed.
pub fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))?;
    let mut files = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    files.retain(|path| path.extension().is_some_and(|extension| extension == "txt"));
    files.sort();
    Ok(files)
}

/// The text of a file with other lines below its `tables:`.
pub fn with_tables(text: &str, tables: &[Vec<String>]) -> String {
    let mut tables = tables.iter();
    let mut written = String::new();
    let mut skipped = false;
    for line in text.lines() {
        skipped &= line.starts_with(' ');
        if !skipped {
            written += &format!("{line}\n");
        }
        if line == "tables:" {
            skipped = true;
            written.extend(tables.next().into_iter().flatten().map(|line| format!("  {line}\n")));
        }
    }
    written
}

/// The line of a scenario for a node of this kind.
const MASQUERADING: &str = "masquerading:";

/// A case as a file.
pub fn write(title: &str, configuration: Configuration, steps: &[Step]) -> String {
    let title: String = title.lines().map(|line| format!("# {line}\n")).collect();
    let steps: String = steps.iter().map(|step| format!("{step}\n")).collect();
    let kind = match configuration {
        Configuration::Usual => String::new(),
        Configuration::Masquerading => format!("{MASQUERADING}\n"),
    };
    title + &kind + &steps
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINES: [&str; 10] = [
        r#"apply: {"kind":"Pod","metadata":{"name":"p0"}}"#,
        "1: send udp 10.0.0.1:1 > 10.0.0.2:2 data 01 in fragments of 8",
        "2: answer 1 udp",
        "3: answer 1 tcp SYN,ACK",
        "4: answer 2 sctp init-ack",
        "6: answer 2 echo",
        "7: send udp 10.0.0.1:1 > 10.0.0.2:2 by pod 10.0.0.3",
        "5: error 1 router 3/4 quoting 28",
        "wait 40",
        "remove Service default/web",
    ];

    #[test]
    fn steps_are_read_and_written_back() {
        for line in LINES {
            assert_eq!(line.parse::<Step>().unwrap().to_string(), line);
        }
        let steps: Vec<Step> = LINES.iter().map(|line| line.parse().unwrap()).collect();
        let kind = Configuration::Masquerading;
        let scenario: Scenario = write("a title\nof two lines", kind, &steps).parse().unwrap();
        assert_eq!(scenario.configuration, kind);
        assert_eq!((scenario.steps, scenario.title.as_str()), (steps, "# a title\n# of two lines\n"));
    }

    #[test]
    fn objects_tables_and_alternatives_are_read() {
        let text = "# t\napply:\n  kind: Pod\n  ---\n  kind: Node\ntables:\n  a\n  b\n\n1: send udp 10.0.0.1:1 > 10.0.0.2:2\n  -> dropped\n  -> host udp 10.0.0.1:1 > 10.0.0.2:2\n";
        let scenario: Scenario = text.parse().unwrap();
        assert_eq!(scenario.steps.len(), 3);
        assert_eq!(scenario.steps[1], Step::Apply(json!({"kind": "Node"})));
        assert_eq!(scenario.tables, [(2, vec!["a".to_owned(), "b".to_owned()])]);
        let Step::Send(Send { becomes, .. }) = &scenario.steps[2] else { panic!("no packet") };
        assert_eq!(becomes.len(), 2);
    }

    #[test]
    fn tables_are_written_where_they_are() {
        let text = "tables:\n  old\n  older\nwait 3\ntables:\nwait 4\n";
        let tables = [vec!["new".to_owned()], vec!["more".to_owned()]];
        assert_eq!(with_tables(text, &tables), "tables:\n  new\nwait 3\ntables:\n  more\nwait 4\n");
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (text, expected) in [
            ("wait long", "line 1: seconds"),
            ("\nnonsense here", "line 2: no such step"),
            ("1: send udp 10.0.0.1:1 > 10.0.0.2:2 in fragments of 9", "multiples of eight"),
            ("wait 3\n  -> dropped", "only of a packet"),
            ("1: error 2 nobody 3/3 quoting 9", "no such sender"),
            ("# empty", "nothing happens"),
        ] {
            let error = format!("{:#}", text.parse::<Scenario>().unwrap_err());
            assert!(error.contains(expected), "{error}");
        }
    }
}
