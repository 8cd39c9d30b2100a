//! Reads a document object by object: a `List` of a whole cluster is never in memory as a whole.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::document::{Item, item, text_of};

/// The objects of a document: itself, or its `items` where it is a list.
#[derive(Clone, Copy)]
pub(super) struct Objects<'a> {
    pub(super) place: &'a str,
    pub(super) node: &'a str,
}

/// The value of a field `items`; `None` where it is no list.
#[derive(Clone, Copy)]
struct Elements<'a>(Objects<'a>);

/// An element of a list. Its list may say what it is only after it: keys have any order.
enum Element {
    Parsed(Item),
    /// Says itself neither its kind nor its version.
    Bare(Map<String, Value>),
}

impl Objects<'_> {
    fn finish(self, fields: Map<String, Value>, elements: Option<Vec<Element>>) -> Vec<Item> {
        let version = text_of(&fields, "apiVersion").to_owned();
        let kind = text_of(&fields, "kind").strip_suffix("List").map(str::to_owned);
        let (Some(kind), Some(elements)) = (kind, elements) else {
            return vec![item(Value::Object(fields), self.place, self.node)];
        };
        let items = elements.into_iter().enumerate().map(|(index, element)| match element {
            Element::Parsed(item) => item,
            Element::Bare(mut fields) => {
                fields.insert("apiVersion".into(), version.as_str().into());
                fields.insert("kind".into(), kind.as_str().into());
                item(Value::Object(fields), &self.element(index), self.node)
            }
        });
        items.collect()
    }

    fn element(&self, index: usize) -> String {
        format!("{}, items[{index}]", self.place)
    }
}

impl<'de> DeserializeSeed<'de> for Objects<'_> {
    type Value = Vec<Item>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Vec<Item>, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Objects<'_> {
    type Value = Vec<Item>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a Kubernetes object")
    }

    fn visit_unit<E>(self) -> Result<Vec<Item>, E> {
        Ok(Vec::new())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Vec<Item>, A::Error> {
        let (mut fields, mut elements) = (Map::new(), None);
        while let Some(key) = map.next_key::<String>()? {
            if key == "items" {
                elements = map.next_value_seed(Elements(self))?;
            } else {
                fields.insert(key, map.next_value()?);
            }
        }
        Ok(self.finish(fields, elements))
    }
}

impl<'de> DeserializeSeed<'de> for Elements<'_> {
    type Value = Option<Vec<Element>>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Elements<'_> {
    type Value = Option<Vec<Element>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of Kubernetes objects")
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(Some(Vec::new()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut elements = Vec::new();
        while let Some(value) = seq.next_element::<Value>()? {
            elements.push(
                if value.get("kind").is_none()
                    && let Value::Object(fields) = value
                {
                    Element::Bare(fields)
                } else {
                    Element::Parsed(item(value, &self.0.element(elements.len()), self.0.node))
                },
            );
        }
        Ok(Some(elements))
    }

    // Some other kind's field of the same name.
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(None)
    }

    fn visit_str<E>(self, _: &str) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self::Value, E> {
        Ok(None)
    }
}
