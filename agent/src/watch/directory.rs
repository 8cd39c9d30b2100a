//! What a directory of YAML says and what it said before: reads all of it, emits the difference.
//!
//! Nothing that worked is lost to a mistake: an object whose document became bad keeps its old version, and what is
//! missing from a file that cannot be read in full is kept until the file is whole again.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::document::{self, Item};
use super::{Event, Problem};
use crate::model::ObjectId;

#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    node: Box<str>,
    files: BTreeMap<Arc<str>, File>,
    objects: BTreeMap<ObjectId, Known>,
    ignored: BTreeSet<String>,
    problems: Box<[Problem]>,
    /// Counts the readings.
    pass: u64,
    synced: bool,
}

/// What a file was when it was last read.
#[derive(Debug)]
struct File {
    /// Of its bytes. A file is parsed again where they changed, where it was not clean, or where this is `None`
    /// because a file before it has taken over one of its objects.
    hash: Option<u64>,
    state: FileState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum FileState {
    /// Every object in it is in force.
    Clean,
    /// Which objects are in it is known, but not all are in force.
    Whole,
    /// Something in it might be any object.
    Broken,
}

#[derive(Debug)]
struct Known {
    file: Arc<str>,
    /// The last reading that saw it.
    pass: u64,
    /// Of the converted object that is in force; `None` where there never was a good one.
    hash: Option<u64>,
}

/// One reading as it goes.
struct Pass<'a> {
    emit: &'a mut dyn FnMut(Event),
    problems: Vec<Problem>,
    /// Files whose objects are as they were.
    unchanged: BTreeSet<Arc<str>>,
}

impl Directory {
    pub(super) fn new(path: PathBuf, node: Box<str>) -> Self {
        Self {
            path,
            node,
            files: BTreeMap::new(),
            objects: BTreeMap::new(),
            ignored: BTreeSet::new(),
            problems: Box::default(),
            pass: 0,
            synced: false,
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Reads everything and emits what differs from the last reading.
    pub(super) fn read(&mut self, emit: &mut dyn FnMut(Event)) {
        self.pass += 1;
        let mut pass = Pass { emit, problems: Vec::new(), unchanged: BTreeSet::new() };
        match self.list() {
            Ok(names) => {
                self.read_files(&names, &mut pass);
                self.sweep(&mut pass);
                self.report(pass.problems, emit);
                if !std::mem::replace(&mut self.synced, true) {
                    emit(Event::Synced);
                }
            }
            Err(error) => {
                let message = format!("cannot be read: {error}; what it said before stays in force");
                self.report(vec![document::problem(&self.path.to_string_lossy(), message)], emit);
            }
        }
    }

    /// The names of the YAML and JSON files, sorted. Hidden ones are left out: editors and ConfigMap volumes keep
    /// theirs there.
    fn list(&self) -> io::Result<BTreeSet<Arc<str>>> {
        let mut names = BTreeSet::new();
        for entry in std::fs::read_dir(&self.path)? {
            let name = entry?.file_name();
            let (Some(name), Some(suffix)) = (name.to_str(), Path::new(&name).extension()) else { continue };
            // What is neither a file nor leads to one (a directory, a pipe) is not read; a link that leads nowhere may
            // lead somewhere again, and is tried.
            let other = std::fs::metadata(self.path.join(name)).is_ok_and(|metadata| !metadata.is_file());
            if !name.starts_with('.') && !other && (suffix == "yaml" || suffix == "yml" || suffix == "json") {
                names.insert(name.into());
            }
        }
        Ok(names)
    }

    fn read_files(&mut self, names: &BTreeSet<Arc<str>>, pass: &mut Pass<'_>) {
        self.files.retain(|name, _| names.contains(name));
        for name in names {
            let path = self.path.join(&**name);
            match std::fs::read_to_string(&path) {
                Ok(text) => self.read_file(name, &text, pass),
                Err(error) if error.kind() == io::ErrorKind::NotFound && path.symlink_metadata().is_err() => {
                    self.files.remove(name);
                }
                Err(error) => {
                    let message = format!("cannot be read: {error}; its objects stay as they were");
                    pass.problems.push(document::problem(name, message));
                    self.files.insert(name.clone(), File { hash: None, state: FileState::Broken });
                }
            }
        }
    }

    fn read_file(&mut self, name: &Arc<str>, text: &str, pass: &mut Pass<'_>) {
        let hash = Some(hash_of(text));
        if self.files.get(name).is_some_and(|file| file.hash == hash && file.state == FileState::Clean) {
            pass.unchanged.insert(name.clone());
            return;
        }
        let mut state = FileState::Clean;
        for (index, (line, document)) in document::split(text).into_iter().enumerate() {
            let place = format!("{name}, document {} (line {line})", index + 1);
            for item in document::parse(document, (&place, line), &self.node) {
                state = state.max(self.take(name, item, &place, pass));
            }
        }
        self.files.insert(name.clone(), File { hash, state });
    }

    fn take(&mut self, file: &Arc<str>, item: Item, place: &str, pass: &mut Pass<'_>) -> FileState {
        let (id, change) = match item {
            Item::Object { id, change, triggered } => (id, Ok((change, triggered))),
            Item::Bad { id, problem, instead } => (id, Err((problem, instead))),
            Item::Ignored(kind) => {
                if self.ignored.insert(kind.clone()) {
                    tracing::info!("{place}: objects of kind {kind} are passed over");
                }
                return FileState::Clean;
            }
            Item::Unknown(problem) => {
                pass.problems.push(problem);
                return FileState::Broken;
            }
        };
        let known = self.objects.get(&id);
        if let Some(known) = known
            && (known.pass == self.pass || pass.unchanged.contains(&known.file))
        {
            let message = format!("{id} is also in {}, which comes first: remove one of them", known.file);
            let object = Some(id);
            pass.problems.push(Problem { object, ..document::problem(place, message) });
            return FileState::Whole;
        }
        // Where the object was last in a file that comes later, that file is to find out.
        if let Some(other) =
            known.filter(|known| known.file != *file).and_then(|known| self.files.get_mut(&known.file))
        {
            other.hash = None;
        }
        let old = known.and_then(|known| known.hash);
        let (hash, state) = match change {
            Ok((change, triggered)) => {
                let hash = hash_of(&change);
                if old != Some(hash) {
                    let triggered = super::triggered(&change, triggered);
                    (pass.emit)(Event::Change(change));
                    triggered.into_iter().for_each(&mut *pass.emit);
                }
                (Some(hash), FileState::Clean)
            }
            Err((problem, instead)) => {
                pass.problems.push(problem);
                let instead = instead.filter(|_| old.is_none());
                let hash = instead.as_deref().map(hash_of).or(old);
                if let Some(change) = instead {
                    (pass.emit)(Event::Change(*change));
                }
                (hash, FileState::Whole)
            }
        };
        self.objects.insert(id, Known { file: file.clone(), pass: self.pass, hash });
        state
    }

    /// Emits what is gone: objects that no document names any more, but for those of broken files.
    fn sweep(&mut self, pass: &mut Pass<'_>) {
        let (files, current) = (&self.files, self.pass);
        self.objects.retain(|id, known| {
            let file = files.get(&known.file);
            let kept = known.pass == current
                || pass.unchanged.contains(&known.file)
                || file.is_some_and(|file| file.state == FileState::Broken);
            if !kept && known.hash.is_some() {
                (pass.emit)(Event::Change(id.gone()));
            }
            kept
        });
    }

    fn report(&mut self, problems: Vec<Problem>, emit: &mut dyn FnMut(Event)) {
        if *self.problems == *problems {
            return;
        }
        for problem in problems.iter().filter(|problem| !self.problems.contains(problem)) {
            tracing::warn!("{problem}");
        }
        if problems.is_empty() {
            tracing::info!("{}: every document is in force again", self.path.display());
        }
        self.problems = problems.into();
        emit(Event::Problems(self.problems.clone()));
    }
}

pub(super) fn hash_of(value: &(impl Hash + ?Sized)) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::withheld as withheld_by;
    use super::*;
    use crate::model::{Change, Name, Withheld};

    /// A directory on disk and its reader.
    struct Fixture {
        dir: tempfile::TempDir,
        directory: Directory,
    }

    impl Fixture {
        fn new(files: &[(&str, &str)]) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let directory = Directory::new(dir.path().to_owned(), "here".into());
            let fixture = Self { dir, directory };
            for (name, text) in files {
                fixture.write(name, text);
            }
            fixture
        }

        fn write(&self, name: &str, text: &str) {
            fs::write(self.dir.path().join(name), text).unwrap();
        }

        fn remove(&self, name: &str) {
            fs::remove_file(self.dir.path().join(name)).unwrap();
        }

        /// `+web:80` for a Service that is set, `-web` for one that is gone, `!` and how many for problems.
        fn read(&mut self) -> String {
            let mut said = Vec::new();
            self.directory.read(&mut |event| {
                said.push(match event {
                    Event::Change(Change::Service(name, Some(service))) => {
                        format!("+{}:{}", name.name, service.ports[0].port)
                    }
                    Event::Change(Change::Service(name, None)) => format!("-{}", name.name),
                    Event::Change(other) => format!("{other:?}"),
                    Event::Problems(problems) => format!("!{}", problems.len()),
                    Event::Synced => "synced".into(),
                    Event::Contact(contact) => format!("{contact:?}"),
                    Event::Triggered { service, .. } => format!("triggered {service}"),
                });
            });
            said.join(" ")
        }

        fn problems(&self) -> Vec<String> {
            self.directory.problems.iter().map(ToString::to_string).collect()
        }
    }

    fn web(name: &str, port: u32) -> String {
        format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\n\
             spec: {{clusterIP: 10.96.0.1, ports: [{{port: {port}}}]}}\n"
        )
    }

    const BROKEN: &str = "---\nkind: [\n";

    #[test]
    fn only_what_changed_is_said() {
        let mut it = Fixture::new(&[("b.yml", &web("b", 1)), ("a.yaml", &(web("a", 1) + &web("c", 1)))]);
        it.write("notes.txt", "not for us");
        it.write(".hidden.yaml", BROKEN);
        assert_eq!(it.read(), "+a:1 +c:1 +b:1 synced");
        assert_eq!(it.read(), "");
        it.write("a.yaml", &("# a comment\n".to_owned() + &web("c", 2) + &web("a", 1)));
        assert_eq!(it.read(), "+c:2");
        it.write("a.yaml", &web("a", 1));
        assert_eq!(it.read(), "-c");
        it.remove("b.yml");
        assert_eq!(it.read(), "-b");
    }

    #[test]
    fn rule_42_a_slice_that_changed_says_since_when() {
        let slice = |address: &str, second: u8| {
            format!(
                "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n\
                 metadata:\n  name: s\n  labels: {{kubernetes.io/service-name: web}}\n\
                 \x20 annotations: {{endpoints.kubernetes.io/last-change-trigger-time: \"2026-01-01T00:00:0{second}Z\"}}\n\
                 endpoints: [{{addresses: [{address}]}}]\n"
            )
        };
        let mut it = Fixture::new(&[("a.yaml", &slice("10.0.0.1", 1))]);
        let first = it.read();
        assert!(first.contains("triggered default/web synced"), "{first}");
        it.write("a.yaml", &slice("10.0.0.1", 2));
        assert_eq!(it.read(), "", "the endpoints are what they were");
        it.write("a.yaml", &slice("10.0.0.2", 3));
        assert!(it.read().ends_with("triggered default/web"));
        it.remove("a.yaml");
        assert!(!it.read().contains("triggered"));
    }

    #[test]
    fn a_bad_document_keeps_the_old_version() {
        let mut it = Fixture::new(&[("a.yaml", &(web("a", 1) + &web("b", 1)))]);
        it.read();
        it.write("a.yaml", &(web("a", 70000) + &web("b", 2)));
        assert_eq!(it.read(), "+b:2 !1");
        assert_eq!(
            it.problems(),
            [
                "a.yaml, document 1 (line 1), Service default/a: spec.ports[0].port: 70000 is not a port (1-65535)"
            ]
        );
        assert_eq!(it.read(), "", "said once");
        it.write("a.yaml", &(web("a", 1) + &web("b", 2)));
        assert_eq!(it.read(), "!0", "the old version was in force all the time");
        it.write("a.yaml", &(web("a", 70000) + &web("b", 2)));
        it.read();
        it.remove("a.yaml");
        assert_eq!(it.read(), "-a -b !0");
    }

    #[test]
    fn a_broken_file_loses_nothing_until_it_is_whole_again() {
        let mut it = Fixture::new(&[("a.yaml", &(web("a", 1) + &web("b", 1) + &web("c", 1)))]);
        it.read();
        it.write("a.yaml", &(web("a", 2) + BROKEN + &web("c", 1)));
        assert_eq!(it.read(), "+a:2 !1");
        assert_eq!(
            it.problems(),
            ["a.yaml, document 2 (line 6): cannot be read: unclosed bracket '[' at line 7, column 7"]
        );
        assert_eq!(it.read(), "");
        it.write("z.yaml", &web("b", 3));
        assert_eq!(it.read(), "+b:3", "another file may take over what is only kept");
        it.write("a.yaml", &web("a", 2));
        assert_eq!(it.read(), "-c !0");
    }

    #[test]
    fn a_first_reading_with_bad_documents_is_complete() {
        let mut it = Fixture::new(&[("a.yaml", &(web("a", 0) + BROKEN)), ("b.yaml", &web("b", 1))]);
        assert_eq!(it.read(), "+b:1 !2 synced");
        it.remove("a.yaml");
        assert_eq!(it.read(), "!0", "what never was in force is not said to be gone");
    }

    #[test]
    fn a_problem_says_whose_it_is() {
        let bad_slice = "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: ipv4\n\
                         metadata: {name: s, labels: {kubernetes.io/service-name: owner}}\n";
        let mut it = Fixture::new(&[("a.yaml", &(web("a", 0) + bad_slice + &web("b", 1) + &web("b", 1)))]);
        it.read();
        let withheld = |names: &[&str]| Withheld::Some {
            services: names.iter().map(|name| Name::new("default", *name)).collect(),
            pods: BTreeSet::new(),
            nodes: false,
        };
        assert_eq!(it.problems().len(), 3);
        assert_eq!(withheld_by(&it.directory.problems), withheld(&["a", "owner"]), "b is in force");
        it.write("b.yaml", "{apiVersion: v1, kind: Pod, metadata: {name: p}, status: {podIP: x}}");
        it.read();
        assert!(
            matches!(withheld_by(&it.directory.problems), Withheld::Some { pods, .. } if pods.len() == 1)
        );
        it.write("c.yaml", BROKEN);
        it.read();
        assert_eq!(withheld_by(&it.directory.problems), Withheld::Any);
    }

    #[test]
    fn the_first_of_two_documents_of_an_object_wins() {
        let mut it = Fixture::new(&[("m.yaml", &web("a", 1))]);
        it.read();
        it.write("z.yaml", &web("a", 2));
        assert_eq!(it.read(), "!1");
        assert_eq!(
            it.problems(),
            [
                "z.yaml, document 1 (line 1): Service default/a is also in m.yaml, which comes first: remove one of them"
            ]
        );
        it.write("b.yaml", &web("a", 3));
        assert_eq!(it.read(), "+a:3 !2", "an earlier file takes over, and the unchanged one is reported");
        assert!(
            it.problems()[0].starts_with("m.yaml, document 1 (line 1): Service default/a is also in b.yaml")
        );
        it.remove("b.yaml");
        assert_eq!(it.read(), "+a:1 !1");
        it.remove("m.yaml");
        assert_eq!(it.read(), "+a:2 !0");
        it.write("z.yaml", &(web("a", 2) + &web("a", 4)));
        assert_eq!(it.read(), "!1");
        it.write("z.yaml", &(web("a", 2) + BROKEN));
        assert_eq!(it.read(), "!1");
        it.write("z.yaml", "");
        assert_eq!(it.read(), "-a !0");
    }

    #[test]
    fn an_object_that_moves_to_another_file_is_never_gone() {
        let mut it = Fixture::new(&[("m.yaml", &web("a", 1))]);
        it.read();
        it.remove("m.yaml");
        it.write("b.yaml", &web("a", 1));
        assert_eq!(it.read(), "");
        it.remove("b.yaml");
        it.write("z.yaml", &web("a", 1));
        assert_eq!(it.read(), "");
    }

    #[test]
    fn what_cannot_be_read_keeps_its_objects() {
        let mut it = Fixture::new(&[("a.yaml", &web("a", 1)), ("b.yaml", &web("b", 1))]);
        it.read();
        fs::write(it.dir.path().join("a.yaml"), [0xff, 0xfe]).unwrap();
        assert_eq!(it.read(), "!1");
        it.remove("b.yaml");
        std::os::unix::fs::symlink("nowhere", it.dir.path().join("b.yaml")).unwrap();
        assert_eq!(it.read(), "!2", "a link that leads nowhere may lead somewhere again");
        it.remove("b.yaml");
        assert_eq!(it.read(), "-b !1");
        let moved = it.dir.path().with_extension("moved");
        fs::rename(it.dir.path(), &moved).unwrap();
        assert_eq!(it.read(), "!1");
        assert!(
            it.problems()[0].contains("cannot be read: No such file or directory"),
            "{:?}",
            it.problems()
        );
        fs::rename(&moved, it.dir.path()).unwrap();
        it.write("a.yaml", &web("a", 2));
        assert_eq!(it.read(), "+a:2 !0");
    }

    #[test]
    fn a_directory_that_is_not_there_yet_is_no_complete_reading() {
        let mut it = Fixture::new(&[]);
        let path = it.dir.path().to_owned();
        fs::remove_dir(&path).unwrap();
        assert_eq!(it.read(), "!1");
        fs::create_dir(&path).unwrap();
        it.write("a.yaml", &web("a", 1));
        assert_eq!(it.read(), "+a:1 !0 synced");
    }

    #[test]
    fn a_policy_that_never_was_good_closes_until_it_is() {
        let policy = |port: u32| {
            format!(
                "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: p}}\n\
                 spec: {{podSelector: {{}}, ingress: [{{ports: [{{port: {port}}}]}}]}}\n"
            )
        };
        let mut fixture = Fixture::new(&[("p.yaml", &policy(0))]);
        let mut read = || {
            let mut said = Vec::new();
            fixture.directory.read(&mut |event| {
                if let Event::Change(Change::NetworkPolicy(_, policy)) = event {
                    said.push(policy.map(|policy| policy.ingress.unwrap_or_default().len()));
                }
            });
            said
        };
        assert_eq!((read(), read()), (vec![Some(0)], vec![]), "cut off, and said once");
        let rewrite = |text: &str| fs::write(fixture.dir.path().join("p.yaml"), text).unwrap();
        rewrite(&policy(80));
        assert_eq!(read(), [Some(1)]);
        rewrite(&policy(0));
        assert_eq!(read(), [], "what worked stays");
        rewrite("");
        assert_eq!(read(), [None]);
    }
}
