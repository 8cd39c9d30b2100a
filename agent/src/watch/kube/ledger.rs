//! What the API said of one kind: of each object a name and a hash, so that a new list tells what changed and what is
//! gone. The objects themselves are converted and dropped.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::time::SystemTime;

use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use super::super::directory::hash_of;
use super::super::{Event, Problem, convert, document};
use super::fault::Garbage;
use crate::model::{Change, Kind, ObjectId};

#[derive(Debug)]
pub(super) struct Ledger {
    kind: Kind,
    /// The node this agent runs on.
    node: Box<str>,
    /// By namespace and name, `default/web`; `/a` for what has no namespace.
    known: HashMap<Box<str>, Known>,
    problems: BTreeMap<Box<str>, Problem>,
    /// The problems are not those that were taken last.
    news: bool,
    /// Counts the lists that were begun.
    list: u32,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    /// Of the converted object that is in force; 0 where there is none.
    hash: u64,
    /// The last list that was under way when it was seen.
    list: u32,
}

/// The part of an object that says which it is.
#[derive(Deserialize)]
struct Head<'a> {
    #[serde(borrow)]
    metadata: Metadata<'a>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata<'a> {
    #[serde(borrow, default)]
    name: Cow<'a, str>,
    #[serde(borrow, default)]
    namespace: Cow<'a, str>,
    #[serde(borrow, default)]
    resource_version: Cow<'a, str>,
    /// As it stands: of most objects nothing in it is read.
    #[serde(borrow, default)]
    annotations: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Annotations<'a> {
    #[serde(borrow, default, rename = "endpoints.kubernetes.io/last-change-trigger-time")]
    trigger: Cow<'a, str>,
}

impl Ledger {
    pub(super) fn new(kind: Kind, node: Box<str>) -> Self {
        Self { kind, node, known: HashMap::new(), problems: BTreeMap::new(), news: false, list: 0 }
    }

    pub(super) fn kind(&self) -> Kind {
        self.kind
    }

    /// A list begins: what it does not name is gone when it is [finished](Ledger::finish).
    pub(super) fn begin(&mut self) {
        self.list = self.list.wrapping_add(1);
    }

    /// An object as it is now. Returns its version.
    ///
    /// # Errors
    /// What is no object at all; one with bad fields is a [`Problem`].
    pub(super) fn take(&mut self, object: &[u8], said: &mut Vec<Event>) -> Result<Box<str>, Garbage> {
        let Metadata { name, namespace, resource_version, annotations } = head(object)?;
        let key = format!("{namespace}/{name}");
        let old = self.known.get(&*key).map_or(0, |known| known.hash);
        let hash = match self.read(&key, object) {
            Ok((id, change)) => {
                if self.problems.remove(&*key).is_some() {
                    tracing::info!("{id} is in force again");
                    self.news = true;
                }
                let gone = change == id.gone();
                let hash = if gone { 0 } else { hash_of(&change).max(1) };
                if hash != old {
                    let triggered = super::super::triggered(&change, annotations.and_then(trigger));
                    said.push(Event::Change(change));
                    said.extend(triggered);
                }
                // What is not for us takes no room.
                if gone {
                    self.known.remove(&*key);
                    return Ok(resource_version.into());
                }
                hash
            }
            Err(problem) => {
                self.refuse(&key, problem);
                match self.instead(&key, object).filter(|_| old == 0) {
                    Some(change) => {
                        let hash = hash_of(&change).max(1);
                        said.push(Event::Change(change));
                        hash
                    }
                    None => old,
                }
            }
        };
        self.known.insert(key.into(), Known { hash, list: self.list });
        Ok(resource_version.into())
    }

    /// An object that was deleted. Returns the version at which it was.
    ///
    /// # Errors
    /// What is no object.
    pub(super) fn remove(&mut self, object: &[u8], said: &mut Vec<Event>) -> Result<Box<str>, Garbage> {
        let Metadata { name, namespace, resource_version, .. } = head(object)?;
        let key = format!("{namespace}/{name}");
        if let Some(known) = self.known.remove(&*key) {
            said.extend(self.gone(&key, known));
            self.news |= self.problems.remove(&*key).is_some();
        }
        Ok(resource_version.into())
    }

    /// The list is complete: says what it did not name, which is gone.
    pub(super) fn finish(&mut self, said: &mut Vec<Event>) {
        let unseen = |known: &Known| known.list != self.list;
        let gone: Vec<Box<str>> =
            self.known.iter().filter(|(_, known)| unseen(known)).map(|(key, _)| key.clone()).collect();
        for key in gone {
            if let Some(known) = self.known.remove(&key) {
                said.extend(self.gone(&key, known));
            }
        }
        let problems = self.problems.len();
        self.problems.retain(|key, _| self.known.contains_key(key));
        self.news |= problems != self.problems.len();
    }

    /// What is refused at present, where that is not what was taken last.
    pub(super) fn take_problems(&mut self) -> Option<Box<[Problem]>> {
        std::mem::take(&mut self.news).then(|| self.problems.values().cloned().collect())
    }

    fn gone(&self, key: &str, known: Known) -> Option<Event> {
        let in_force = known.hash != 0;
        let id = self.id(key).ok().filter(|_| in_force)?;
        Some(Event::Change(id.gone()))
    }

    fn id(&self, key: &str) -> Result<ObjectId, Problem> {
        let (namespace, name) = key.split_once('/').unwrap_or_default();
        let namespace = Some(namespace).filter(|namespace| !namespace.is_empty());
        match convert::name(namespace, name, document::name_limit(self.kind)) {
            Ok(name) => Ok(ObjectId { kind: self.kind, name }),
            Err(invalid) => Err(document::problem(&format!("{:?} {key}", self.kind), invalid.to_string())),
        }
    }

    fn read(&self, key: &str, object: &[u8]) -> Result<(ObjectId, Change), Problem> {
        let id = self.id(key)?;
        let typed = &mut serde_json::Deserializer::from_slice(object);
        match document::change(self.kind, typed, &self.node) {
            Ok(change) => Ok((id, change)),
            Err(message) => {
                let whole = serde_json::from_slice::<Value>(object).unwrap_or_default();
                let metadata = whole.get("metadata").and_then(Value::as_object);
                let service = metadata.and_then(|metadata| document::service_of(&id, metadata));
                let place = id.to_string();
                Err(Problem { object: Some(id), service, ..document::problem(&place, message) })
            }
        }
    }

    /// What is in force in place of an object that has never made sense, where that is not nothing.
    fn instead(&self, key: &str, object: &[u8]) -> Option<Change> {
        document::instead(&self.id(key).ok()?, &serde_json::from_slice(object).ok()?)
    }

    fn refuse(&mut self, key: &str, problem: Problem) {
        if self.problems.get(key) != Some(&problem) {
            tracing::warn!("{problem}");
            self.problems.insert(key.into(), problem);
            self.news = true;
        }
    }
}

fn head(object: &[u8]) -> Result<Metadata<'_>, Garbage> {
    let Head { metadata } = serde_json::from_slice(object).map_err(|error| Garbage::NoObject { error })?;
    Ok(metadata)
}

fn trigger(annotations: &RawValue) -> Option<SystemTime> {
    let Annotations { trigger } = serde_json::from_str(annotations.get()).ok()?;
    convert::trigger(&trigger)
}

/// The version that a bookmark gives.
///
/// # Errors
/// What is no object.
pub(super) fn version(object: &[u8]) -> Result<Box<str>, Garbage> {
    Ok(head(object)?.resource_version.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixture {
        ledger: Ledger,
        said: Vec<Event>,
    }

    impl Fixture {
        fn new(kind: Kind) -> Self {
            Self { ledger: Ledger::new(kind, "here".into()), said: Vec::new() }
        }

        fn take(&mut self, object: &str) {
            self.ledger.take(object.as_bytes(), &mut self.said).unwrap();
        }

        fn list(&mut self, objects: &[&str]) {
            self.ledger.begin();
            for object in objects {
                self.take(object);
            }
            self.ledger.finish(&mut self.said);
        }

        /// `+web:80` and `-web`.
        fn said(&mut self) -> String {
            let text = |event: Event| match event {
                Event::Change(Change::Service(name, Some(service))) => {
                    format!("+{}:{}", name.name, service.ports[0].port)
                }
                Event::Change(Change::Service(name, None)) => format!("-{}", name.name),
                Event::Change(other) => format!("{other:?}"),
                other
                @ (Event::Problems(_) | Event::Synced | Event::Contact(_) | Event::Triggered { .. }) => {
                    format!("{other:?}")
                }
            };
            let mut said: Vec<_> = self.said.drain(..).map(text).collect();
            said.sort();
            said.join(" ")
        }
    }

    fn web(name: &str, port: u32) -> String {
        format!(
            r#"{{"metadata":{{"name":"{name}","namespace":"default","resourceVersion":"5"}},
                "spec":{{"clusterIP":"10.96.0.1","ports":[{{"port":{port}}}]}}}}"#
        )
    }

    #[test]
    fn a_new_list_says_what_changed_and_what_is_gone() {
        let mut it = Fixture::new(Kind::Service);
        it.list(&[&web("a", 1), &web("b", 1), &web("c", 1)]);
        assert_eq!(it.said(), "+a:1 +b:1 +c:1");
        it.list(&[&web("a", 1), &web("b", 2)]);
        assert_eq!(it.said(), "+b:2 -c");
        assert_eq!(it.ledger.known.len(), 2);
    }

    #[test]
    fn a_list_that_broke_off_takes_nothing_away() {
        let mut it = Fixture::new(Kind::Service);
        it.list(&[&web("a", 1), &web("b", 1)]);
        it.ledger.begin();
        it.take(&web("a", 2));
        assert_eq!(it.said(), "+a:1 +a:2 +b:1", "of both lists");
        it.list(&[&web("b", 1)]);
        assert_eq!(it.said(), "-a");
    }

    #[test]
    fn a_bad_object_is_named_and_keeps_its_old_version() {
        let mut it = Fixture::new(Kind::Service);
        it.take(&web("a", 1));
        it.take(&web("a", 70000));
        assert_eq!(it.said(), "+a:1");
        let problems = it.ledger.take_problems().unwrap();
        let shown: Vec<_> = problems.iter().map(ToString::to_string).collect();
        assert_eq!(shown, ["Service default/a: spec.ports[0].port: 70000 is not a port (1-65535)"]);
        assert_eq!(problems[0].service, problems[0].object.as_ref().map(|id| id.name.clone()));
        it.take(&web("a", 70000));
        assert_eq!(it.ledger.take_problems(), None, "said once");
        it.list(&[&web("a", 1)]);
        assert_eq!(it.said(), "", "it was in force all the time");
        assert_eq!(it.ledger.take_problems().as_deref(), Some(&[][..]));
        it.take(&web("a", 70000));
        it.list(&[]);
        assert_eq!((it.said(), it.ledger.take_problems().unwrap().len()), ("-a".into(), 0));
    }

    #[test]
    fn rule_42_a_slice_says_what_set_it_off_where_it_changed_and_not_when_it_goes() {
        let slice = |address: &str, trigger: &str| {
            format!(
                r#"{{"metadata":{{"name":"s","namespace":"n","labels":{{"kubernetes.io/service-name":"web"}},
                    "annotations":{{"a":"b","endpoints.kubernetes.io/last-change-trigger-time":{trigger}}}}},
                    "addressType":"IPv4","endpoints":[{{"addresses":["{address}"]}}]}}"#
            )
        };
        let mut it = Fixture::new(Kind::EndpointSlice);
        let mut taken = |object: &str| {
            it.take(object);
            let triggered = it.said.iter().find_map(|event| match event {
                Event::Triggered { service, at } => Some((service.clone(), *at)),
                Event::Change(_) | Event::Problems(_) | Event::Synced | Event::Contact(_) => None,
            });
            (std::mem::take(&mut it.said).len(), triggered)
        };
        let at = |seconds| SystemTime::UNIX_EPOCH + std::time::Duration::from_millis(seconds);
        let web = crate::model::Name::new("n", "web");
        let first = "\"1970-01-01T00:01:40.5Z\"";
        assert_eq!(taken(&slice("10.0.0.1", first)), (2, Some((web, at(100_500)))));
        assert_eq!(taken(&slice("10.0.0.1", "\"1970-01-01T00:01:41Z\"")), (0, None), "nothing changed");
        for none in ["\"\"", "\"yesterday\""] {
            assert_eq!(taken(&slice("10.0.0.2", none)).1, None, "{none}");
            assert_eq!(taken(&slice("10.0.0.3", first)).0, 2);
        }
        it.ledger.remove(slice("10.0.0.3", first).as_bytes(), &mut it.said).unwrap();
        assert_eq!(it.said.len(), 1, "a slice that goes: {:?}", it.said);
    }

    #[test]
    fn rule_43_a_policy_that_never_made_sense_cuts_off_until_it_does_and_goes() {
        let mut it = Fixture::new(Kind::NetworkPolicy);
        let policy = |ports: &str| {
            format!(
                r#"{{"metadata":{{"name":"p","namespace":"n"}},
                    "spec":{{"podSelector":{{}},"ingress":[{{"ports":{ports}}}]}}}}"#
            )
        };
        let isolates = |said: &str| said.starts_with("NetworkPolicy(") && said.contains("ingress: Some([])");
        it.take(&policy("7"));
        let first = it.said();
        assert!(isolates(&first), "{first}");
        it.take(&policy("7"));
        assert_eq!(it.said(), "", "said once");
        it.take(&policy(r#"[{"port":80}]"#));
        let good = it.said();
        assert!(good.starts_with("NetworkPolicy(") && !isolates(&good), "{good}");
        it.take(&policy("8"));
        assert_eq!(it.said(), "", "the good one stays");
        it.list(&[]);
        assert!(it.said().ends_with("None)"));
    }

    #[test]
    fn a_field_of_another_type_is_a_problem_and_not_the_end() {
        let mut it = Fixture::new(Kind::EndpointSlice);
        it.take(
            r#"{"metadata":{"name":"s","namespace":"n","labels":{"kubernetes.io/service-name":"web"}},
                "addressType":"IPv4","endpoints":[{"addresses":"10.0.0.1"}]}"#,
        );
        let problems = it.ledger.take_problems().unwrap();
        assert!(
            problems[0].to_string().starts_with("EndpointSlice n/s: endpoints[0].addresses: invalid type"),
            "{}",
            problems[0]
        );
        assert_eq!(problems[0].service.as_ref().map(ToString::to_string).as_deref(), Some("n/web"));
        for garbage in ["", "{", "7", "{\"metadata\":7}", "{}", "{\"metadata\":{\"name\":\"a\"}"] {
            assert!(it.ledger.take(garbage.as_bytes(), &mut it.said).is_err(), "{garbage}");
        }
    }

    #[test]
    fn what_is_not_for_us_comes_and_goes() {
        let headless = web("a", 1).replace("10.96.0.1", "None");
        let mut it = Fixture::new(Kind::Service);
        it.take(&headless);
        assert_eq!((it.said(), it.ledger.known.len()), (String::new(), 0));
        it.take(&web("a", 1));
        it.take(&headless);
        assert_eq!(it.said(), "+a:1 -a");
        it.take(&web("a", 1));
        it.ledger.remove(headless.as_bytes(), &mut it.said).unwrap();
        it.ledger.remove(headless.as_bytes(), &mut it.said).unwrap();
        assert_eq!(it.said(), "+a:1 -a");
    }

    #[test]
    fn what_has_no_namespace_is_known_by_its_name() {
        let mut it = Fixture::new(Kind::Node);
        it.take(r#"{"metadata":{"name":"a"}}"#);
        it.list(&[]);
        assert_eq!(it.said.pop(), Some(Event::Change(Change::Node("a".into(), None))));
    }
}
