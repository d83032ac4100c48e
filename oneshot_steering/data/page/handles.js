/* Sliders of ipywidgets draw their handles without a name for screen readers; this gives them the text of their label.
   And the page of `oneshot-steering app` learns here that it can be seen: see AppPage in 16a_app. */
if (!window.oneshotNames) {
  window.oneshotNames = () => {
    for (const slider of document.querySelectorAll(".oneshot-strength")) {
      const handle = slider.querySelector(".noUi-handle"), label = slider.querySelector(".widget-label");
      if (handle && label) handle.setAttribute("aria-label", label.textContent);
    }
    const shown = document.querySelector(".oneshot-shown:not([data-pressed])");
    if (shown) {
      shown.dataset.pressed = "";
      shown.click();
    }
  };
  new MutationObserver(window.oneshotNames).observe(document.body, {childList: true, subtree: true});
}
window.oneshotNames();
