//! The objects of a cluster with their history, as etcd and the caches before it have them.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use serde_json::Value;

/// Every object, and every change since the last compaction.
#[derive(Debug, Default)]
pub(super) struct Store {
    version: u64,
    /// By path of the kind, then by namespace and name.
    kinds: BTreeMap<String, BTreeMap<String, Value>>,
    changes: Vec<Change>,
    /// Changes up to this version are forgotten.
    compacted: u64,
}

#[derive(Clone, Debug)]
struct Change {
    version: u64,
    path: String,
    old: Option<Value>,
    new: Option<Value>,
}

/// A page of a list.
pub(super) struct Page {
    pub(super) items: Vec<Value>,
    /// The key after which the next page begins.
    pub(super) last: Option<String>,
}

/// A condition on fields, as in `status.phase!=Failed,metadata.name=web`.
#[derive(Clone, Debug, Default)]
pub(super) struct Selector(Vec<(String, bool, String)>);

impl Store {
    pub(super) fn version(&self) -> u64 {
        self.version
    }

    /// Makes the store hold exactly these objects.
    pub(super) fn set(&mut self, objects: Vec<Value>) -> Result<()> {
        let mut wanted: BTreeMap<(String, String), Value> = BTreeMap::new();
        for object in objects {
            wanted.insert((path_of(&object)?, key_of(&object)?), object);
        }
        let gone: Vec<_> = self
            .kinds
            .iter()
            .flat_map(|(path, objects)| objects.keys().map(move |key| (path.clone(), key.clone())))
            .filter(|id| !wanted.contains_key(id))
            .collect();
        for (path, key) in gone {
            self.remove(&path, &key);
        }
        for ((path, key), object) in wanted {
            self.put(path, key, object);
        }
        Ok(())
    }

    fn put(&mut self, path: String, key: String, mut object: Value) {
        let old = self.kinds.get(&path).and_then(|objects| objects.get(&key)).cloned();
        if old.as_ref().is_some_and(|old| without_version(old) == without_version(&object)) {
            return;
        }
        self.version += 1;
        set_version(&mut object, self.version);
        self.changes.push(Change {
            version: self.version,
            path: path.clone(),
            old,
            new: Some(object.clone()),
        });
        self.kinds.entry(path).or_default().insert(key, object);
    }

    fn remove(&mut self, path: &str, key: &str) {
        let Some(mut old) = self.kinds.get_mut(path).and_then(|objects| objects.remove(key)) else { return };
        self.version += 1;
        set_version(&mut old, self.version);
        self.changes.push(Change { version: self.version, path: path.to_owned(), old: Some(old), new: None });
    }

    /// Something else in the cluster changes: versions go on.
    pub(super) fn advance(&mut self) {
        self.version += 1;
    }

    /// Forgets all changes so far.
    pub(super) fn compact(&mut self) {
        self.compacted = self.version;
        self.changes.clear();
    }

    /// The object of a path like `/api/v1/namespaces/default/services/web` or `/api/v1/nodes/a`.
    pub(super) fn one(&self, path: &str) -> Option<&Value> {
        let (kind, name) = path.rsplit_once('/')?;
        let (root, namespace, plural) = match kind.split_once("/namespaces/") {
            Some((root, rest)) => {
                let (namespace, plural) = rest.split_once('/')?;
                (root, namespace, plural)
            }
            None => {
                let (root, plural) = kind.rsplit_once('/')?;
                (root, "", plural)
            }
        };
        self.kinds.get(&format!("{root}/{plural}"))?.get(&format!("{namespace}/{name}"))
    }

    pub(super) fn page(&self, path: &str, selector: &Selector, (limit, after): (usize, &str)) -> Page {
        let objects = self.kinds.get(path).into_iter().flatten();
        let mut found =
            objects.filter(|(key, object)| key.as_str() > after && selector.takes(object)).peekable();
        let (mut items, mut last) = (Vec::new(), None);
        while let Some((key, object)) = found.next() {
            items.push(object.clone());
            if items.len() == limit {
                last = found.peek().map(|_| key.clone());
                break;
            }
        }
        Page { items, last }
    }

    /// The events since a version; `None` where that is forgotten.
    pub(super) fn since(&self, version: u64, path: &str, selector: &Selector) -> Option<Vec<Value>> {
        if version < self.compacted {
            return None;
        }
        let changes = self.changes.iter().filter(|change| change.version > version && change.path == path);
        Some(changes.filter_map(|change| change.event(selector)).collect())
    }
}

impl Change {
    fn event(&self, selector: &Selector) -> Option<Value> {
        let old = self.old.as_ref().filter(|old| selector.takes(old));
        let new = self.new.as_ref().filter(|new| selector.takes(new));
        let (kind, mut object) = match (old, new) {
            (None, None) => return None,
            (None, Some(new)) => ("ADDED", new.clone()),
            (Some(_), Some(new)) => ("MODIFIED", new.clone()),
            (Some(old), None) => ("DELETED", self.new.as_ref().unwrap_or(old).clone()),
        };
        set_version(&mut object, self.version);
        Some(event(kind, object))
    }
}

impl Selector {
    pub(super) fn parse(text: &str) -> Self {
        let conditions = text.split(',').filter_map(|condition| {
            let (field, wanted) = condition.split_once('=')?;
            let (field, equal) = match field.strip_suffix('!') {
                Some(field) => (field, false),
                None => (field, true),
            };
            Some((format!("/{}", field.replace('.', "/")), equal, wanted.to_owned()))
        });
        Self(conditions.collect())
    }

    fn takes(&self, object: &Value) -> bool {
        self.0.iter().all(|(pointer, equal, wanted)| {
            let text = match object.pointer(pointer) {
                Some(Value::String(text)) => text.clone(),
                Some(Value::Bool(value)) => value.to_string(),
                _ => String::new(),
            };
            (text == *wanted) == *equal
        })
    }
}

/// A line of a watch.
pub(super) fn event(kind: &str, object: Value) -> Value {
    serde_json::json!({ "type": kind, "object": object })
}

/// Where the API has objects of this kind.
fn path_of(object: &Value) -> Result<String> {
    let text = |field: &str| object.get(field).and_then(Value::as_str).with_context(|| format!("no {field}"));
    let (version, kind) = (text("apiVersion")?, text("kind")?.to_lowercase());
    let root = if version.contains('/') { "apis" } else { "api" };
    let plural = match kind.strip_suffix('y') {
        Some(stem) => format!("{stem}ies"),
        None => format!("{kind}s"),
    };
    Ok(format!("/{root}/{version}/{plural}"))
}

fn key_of(object: &Value) -> Result<String> {
    let text = |field: &str| object.pointer(&format!("/metadata/{field}")).and_then(Value::as_str);
    Ok(format!("{}/{}", text("namespace").unwrap_or_default(), text("name").context("no metadata.name")?))
}

fn set_version(object: &mut Value, version: u64) {
    if let Some(Value::Object(metadata)) = object.get_mut("metadata") {
        metadata.insert("resourceVersion".into(), version.to_string().into());
    }
}

/// All fields but the version.
fn without_version(object: &Value) -> Vec<(&String, &Value)> {
    let metadata = object.get("metadata").and_then(Value::as_object).into_iter().flatten();
    let rest = object.as_object().into_iter().flatten().filter(|(key, _)| *key != "metadata");
    metadata.filter(|(key, _)| *key != "resourceVersion").chain(rest).collect()
}
