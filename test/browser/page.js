import {test as base, expect} from '@playwright/test'

export {expect}

// test has a page on which it is a failure if a script ends with an error, or if
// the page needs what its policy does not let it have.
export const test = base.extend({
	page: async ({page}, use) => {
		const errors = []
		page.on('pageerror', error => errors.push(error.message))
		page.on('console', message => {
			if (/content security policy/i.test(message.text())) errors.push(message.text())
		})
		await use(page)
		expect(errors).toEqual([])
	},
})
