//! The devices of our users.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#device-management>

use protocol::id::UserId;
use serde_json::{Map, Value};
use storage::account_data::GLOBAL;
use storage::devices as table;
use storage::devices::Device;

use crate::Homeserver;
use crate::device_lists;
use crate::error::{MatrixError, Result};

/// A longer name is refused.
const DISPLAY_NAME_BYTES_MAX: usize = 1024;

/// A device's settings in account data go with the device (MSC3890).
const LOCAL_NOTIFICATION_SETTINGS: [&str; 2] = [
    "m.local_notification_settings.",
    "org.matrix.msc3890.local_notification_settings.",
];

impl Homeserver {
    pub async fn devices(&self, user: &UserId) -> Result<Vec<Device>> {
        let user = user.clone();
        Ok(self.store().read(move |c| table::list(c, &user)).await?)
    }

    pub async fn device(&self, user: &UserId, device: &str) -> Result<Device> {
        let (user, device) = (user.clone(), device.to_owned());
        let found = self
            .store()
            .read(move |c| table::get(c, &user, &device))
            .await?;
        found.ok_or_else(|| MatrixError::not_found("There is no such device"))
    }

    pub async fn rename_device(
        &self,
        user: &UserId,
        device: &str,
        name: Option<String>,
    ) -> Result<()> {
        if name
            .as_ref()
            .is_some_and(|name| name.len() > DISPLAY_NAME_BYTES_MAX)
        {
            return Err(MatrixError::too_large("The display name is too long"));
        }
        let (owner, device) = (user.clone(), device.to_owned());
        let own = self.config().server_name.clone();
        let audience = self
            .store()
            .write(move |c| {
                if !table::rename(c, &owner, &device, name.as_deref())? {
                    return Ok(None);
                }
                device_lists::record(c, &own, &owner, &[&device]).map(Some)
            })
            .await?;
        let audience = audience.ok_or_else(|| MatrixError::not_found("There is no such device"))?;
        self.tell_device_lists(user, &audience);
        Ok(())
    }

    /// Logs these devices out and forgets all that belongs to them. Unknown ones are passed over.
    pub async fn delete_devices(&self, user: &UserId, devices: Vec<String>) -> Result<()> {
        let (owner, own) = (user.clone(), self.config().server_name.clone());
        let audience = self
            .store()
            .write(move |c| {
                let mut deleted = Vec::new();
                for device in &devices {
                    if !table::delete(c, &owner, device)? {
                        continue;
                    }
                    deleted.push(device.as_str());
                    for prefix in LOCAL_NOTIFICATION_SETTINGS {
                        let kind = format!("{prefix}{device}");
                        if storage::account_data::get(c, &owner, GLOBAL, &kind)?.is_some() {
                            storage::account_data::set(c, &owner, GLOBAL, &kind, "{}")?;
                        }
                    }
                }
                device_lists::record(c, &own, &owner, &deleted)
            })
            .await?;
        self.tell_device_lists(user, &audience);
        Ok(())
    }

    pub async fn delete_all_devices(&self, user: &UserId) -> Result<()> {
        let devices = self.devices(user).await?;
        self.delete_devices(
            user,
            devices.into_iter().map(|device| device.device_id).collect(),
        )
        .await
    }
}

/// A device as the client API shows it.
pub fn to_json(device: &Device) -> Value {
    let mut map = Map::new();
    map.insert("device_id".to_owned(), device.device_id.as_str().into());
    if let Some(name) = &device.display_name {
        map.insert("display_name".to_owned(), name.as_str().into());
    }
    if let Some(ms) = device.last_seen_ms {
        map.insert("last_seen_ts".to_owned(), ms.into());
    }
    if let Some(ip) = &device.last_seen_ip {
        map.insert("last_seen_ip".to_owned(), ip.as_str().into());
    }
    Value::Object(map)
}
